"""Mixture-of-experts layers. `layer` calls these files in the order of computation:

    scoring -> routing -> load_balance (statistics) -> dispatch -> swiglu

`reference` computes the same layer in plain loops, `grouped_matmul` multiplies rows by the weights
of their experts, and `transports` sends rows over a mesh.

Axis letters in shapes such as `[T, n]`, in all of `aoe_jax` except `moe/grouped_matmul`:

    T  tokens of a device           n  experts of a layer          L  layers
    B  sequences                    K  experts per token           V  vocabulary
    S  positions of a sequence      P  slots: token-expert pairs   H  heads of queries
    d  model width                  R  rows, sorted by expert      G  heads of keys and values
    f  width of an expert           r  rank of a factorised gate   h  width of a head
    m  hidden width of a router     s  scoring or routing neurons  c  positions of a cache
    u  width of a shared expert     N  devices on the expert axis  C  capacity of an expert
"""
