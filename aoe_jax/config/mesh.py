"""The group `mesh`."""

from dataclasses import dataclass

from aoe_jax.config.checks import check_settings, require, setting


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh, and how tokens reach their experts; see
    `aoe_jax/sharding.py`.
    """

    data: int = -1  # -1: all devices that the other axes leave
    fsdp: int = setting(1, above=0)  # also splits parameters and optimiser state
    expert: int = setting(1, above=0)  # splits the experts
    tensor: int = setting(1, above=0)  # splits heads, the width of experts, and positions
    # ring: every device of the expert axis gets all tokens of its row of the mesh; all_to_all:
    # tokens go only to the devices of their experts.
    transport: str = setting("ring", choices=("ring", "all_to_all"))

    def __post_init__(self):
        check_settings("mesh", self)
        require(
            self.data > 0 or self.data == -1,
            "mesh.data",
            self.data,
            "must be greater than 0, or -1 for all remaining devices",
        )
        require(
            self.transport == "ring" or self.expert > 1,
            "mesh.transport",
            self.transport,
            "sends rows along the expert axis; set mesh.expert, or leave it at 'ring'",
        )

    def refuse_all_to_all(self, kind):
        """Refuses `all_to_all` for a kind of layer whose rows do not travel.

        Raises:
          UserError: `transport` is "all_to_all".
        """
        wanted = f"is not implemented for experts.kind={kind!r}; leave it at 'ring'"
        require(self.transport == "ring", "mesh.transport", self.transport, wanted)

    def check(self, config):
        """Refuses what the mesh would split unevenly and what no test covers."""
        m, e, d = config.model, config.experts, config.model.d_model
        require(
            m.unroll == 1 or self.fsdp == 1,
            "model.unroll",
            m.unroll,
            f"with mesh.fsdp={self.fsdp}, unrolled layers would keep gathered weights; set 1",
        )
        require(
            self.tensor == 1 or not m.qk_norm,
            "mesh.tensor",
            self.tensor,
            "splits heads, and model.qk_norm spans all heads; set 1",
        )
        splits = [
            ("expert", "experts.n_experts", e.n_experts),
            ("tensor", "model.n_heads", m.n_heads),
            ("tensor", "model.n_kv_heads", m.kv_heads),
            ("tensor", "data.seq_len", config.data.seq_len),
            ("tensor", "experts.d_wide" if e.low_rank else "experts.d_ffn", e.width(d)),
            ("fsdp", "model.d_model", d),
        ]
        if e.low_rank:
            splits.append(("fsdp", "experts.d_low", e.d_low))
        for axis, name, size in splits:
            hint = "; set experts.round_to to a multiple of it" if name == "experts.d_wide" else ""
            pieces = getattr(self, axis)
            require(size % pieces == 0, f"mesh.{axis}", pieces, f"must divide {name}={size}{hint}")
        rows = config.train.batch_size // config.train.accumulate
        shards = max(self.data, 1) * self.fsdp * self.expert
        accumulates = config.train.accumulate > 1
        micro_batch = "train.batch_size" + " / train.accumulate" * accumulates
        require(
            rows % shards == 0,
            "train.batch_size",
            config.train.batch_size,
            f"{micro_batch}={rows} sequences must be divisible by mesh.data * mesh.fsdp * "
            f"mesh.expert = {shards}",
        )
        positions = config.data.seq_len // self.tensor
        require(
            shards * self.tensor == 1 or positions % config.balance.aux_stride == 0,
            "balance.aux_tokens",
            config.balance.aux_tokens,
            f"on this mesh a device has {positions} positions of a sequence, which the denominator "
            "must divide",
        )
