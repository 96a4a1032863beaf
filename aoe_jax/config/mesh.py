"""The group `mesh`."""

from dataclasses import dataclass

from aoe_jax.config.checks import require, require_choice, require_positive


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh, and how tokens reach their experts; see
    `aoe_jax/sharding.py`.
    """

    data: int = -1  # -1: all devices that the other axes leave
    fsdp: int = 1  # parameters and optimiser state are split over it as well
    expert: int = 1  # experts are split over it
    tensor: int = 1  # attention heads, the width of experts, and positions between them
    # ring: every device of the expert axis gets all tokens of its row; all_to_all: tokens go to
    # their experts' devices only.
    transport: str = "ring"

    def __post_init__(self):
        require(
            self.data > 0 or self.data == -1,
            "mesh.data",
            self.data,
            "must be greater than 0, or -1 for the rest",
        )
        require_positive("mesh", self, "fsdp", "expert", "tensor")
        require_choice("mesh.transport", self.transport, ("ring", "all_to_all"))
        require(
            self.transport == "ring" or self.expert > 1,
            "mesh.transport",
            self.transport,
            "sends rows along the expert axis; set mesh.expert, or leave it at 'ring'",
        )

    def check(self, config):
        """Refuses what doesn't fit the other groups: what the mesh would have to split unevenly,
        and what isn't tested.
        """
        m, e, d = config.model, config.experts, config.model.d_model
        merges = "would let the compiler merge what is gathered again with what was gathered before, and keep it; set 1"
        require(
            m.unroll == 1 or self.fsdp == 1,
            "model.unroll",
            m.unroll,
            f"with mesh.fsdp={self.fsdp} {merges}",
        )
        if e.kind == "dense":
            require(
                self.expert == 1,
                "mesh.expert",
                self.expert,
                "a dense model has no experts to split; use fsdp",
            )
        require(
            e.kind != "capacity" or self.expert == 1 or self.transport == "all_to_all",
            "mesh.transport",
            self.transport,
            "with experts.kind='capacity' and mesh.expert, places of experts travel; set 'all_to_all'",
        )
        require(
            e.selects or self.transport == "ring",
            "mesh.transport",
            self.transport,
            f"with experts.kind={e.kind!r} isn't tested; leave it at 'ring'",
        )
        require(
            self.tensor == 1 or not m.qk_norm,
            "mesh.tensor",
            self.tensor,
            "splits heads, which model.qk_norm spans; set 1",
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
        rows, shards = (
            config.train.batch_size // config.train.accumulate,
            max(self.data, 1) * self.fsdp * self.expert,
        )
        micro = (
            "train.batch_size / train.accumulate"
            if config.train.accumulate > 1
            else "train.batch_size"
        )
        require(
            rows % shards == 0,
            "train.batch_size",
            config.train.batch_size,
            f"{micro}={rows} sequences must be divisible by mesh.data * mesh.fsdp * mesh.expert = {shards}",
        )
        local = config.data.seq_len // self.tensor
        require(
            shards * self.tensor == 1 or local % config.balance.aux_stride == 0,
            "balance.aux_tokens",
            config.balance.aux_tokens,
            f"on a mesh, every 1 / aux_tokens-th position must fall alike in each device's {local} positions of a sequence",
        )
