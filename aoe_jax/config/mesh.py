"""The group `mesh`."""

from dataclasses import dataclass

from aoe_jax.config.checks import Group, setting


@dataclass(frozen=True)
class MeshConfig(Group):
    """How many devices lie along each axis of the mesh, and how tokens reach their experts; see
    `aoe_jax/sharding.py`.
    """

    group = "mesh"

    data: int = -1  # -1: all devices that the other axes leave
    fsdp: int = setting(1, above=0)  # also splits parameters and optimiser state
    expert: int = setting(1, above=0)  # splits the experts
    tensor: int = setting(1, above=0)  # splits heads, the width of experts, and positions
    # ring: every device of the expert axis gets all tokens of its row of the mesh; all_to_all:
    # tokens go only to the devices of their experts.
    transport: str = setting("ring", choices=("ring", "all_to_all"))

    def __post_init__(self):
        super().__post_init__()
        self.require(
            self.data > 0 or self.data == -1,
            "data",
            "must be greater than 0, or -1 for all remaining devices",
        )
        self.require(
            self.transport == "ring" or self.expert > 1,
            "transport",
            "sends rows along the expert axis; set mesh.expert, or leave it at 'ring'",
        )

    def refuse_all_to_all(self, kind):
        """Refuses `all_to_all` for a kind of layer whose rows do not travel.

        Raises:
          UserError: `transport` is "all_to_all".
        """
        wanted = f"is not implemented for experts.kind={kind!r}; leave it at 'ring'"
        self.require(self.transport == "ring", "transport", wanted)

    def check(self, config):
        """Refuses what the mesh would split unevenly and what no test covers."""
        m, e, d = config.model, config.experts, config.model.d_model
        m.require(
            m.unroll == 1 or self.fsdp == 1,
            "unroll",
            f"with mesh.fsdp={self.fsdp}, unrolled layers would keep gathered weights; set 1",
        )
        self.require(
            self.tensor == 1 or not m.qk_norm,
            "tensor",
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
            self.require(size % pieces == 0, axis, f"must divide {name}={size}{hint}")
        rows = config.train.batch_size // config.train.accumulate
        shards = max(self.data, 1) * self.fsdp * self.expert
        accumulates = config.train.accumulate > 1
        micro_batch = "train.batch_size" + " / train.accumulate" * accumulates
        config.train.require(
            rows % shards == 0,
            "batch_size",
            f"{micro_batch}={rows} sequences must be divisible by mesh.data * mesh.fsdp * "
            f"mesh.expert = {shards}",
        )
        positions = config.data.seq_len // self.tensor
        config.balance.require(
            shards * self.tensor == 1 or positions % config.balance.aux_stride == 0,
            "aux_tokens",
            f"on this mesh a device has {positions} positions of a sequence, which the denominator "
            "must divide",
        )
