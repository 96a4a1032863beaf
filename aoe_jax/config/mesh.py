"""The group `mesh`."""

from dataclasses import dataclass

from aoe_jax.config.checks import Group, setting


@dataclass(frozen=True)
class MeshConfig(Group):
    """The number of devices along each mesh axis, and how tokens are sent to their experts."""

    group = "mesh"

    data: int = -1  # -1: the number of devices / the product of the other axes
    fsdp: int = setting(1, above=0)  # splits parameters and optimiser state, and the batch
    expert: int = setting(1, above=0)  # splits the experts, and the batch
    tensor: int = setting(1, above=0)  # splits heads, the width of experts, and positions
    # ring: each device gathers the tokens of all devices along the expert axis;
    # all_to_all: each token is sent only to the devices of its experts.
    transport: str = setting("ring", choices=("ring", "all_to_all"))

    def __post_init__(self):
        super().__post_init__()
        if self.data != -1 and self.data <= 0:
            self.refuse("data", "must be greater than 0, or -1 for all remaining devices")
        if self.transport == "all_to_all" and self.expert == 1:
            wanted = "sends tokens along the expert axis; set mesh.expert, or leave it at 'ring'"
            self.refuse("transport", wanted)

    @property
    def shape(self):
        """The sizes of the mesh axes, in the order of `sharding.MESH_AXES`."""
        return self.data, self.fsdp, self.expert, self.tensor

    @property
    def batch_shards(self):
        """The number of parts of a batch; `data=-1` counts as one device."""
        return max(self.data, 1) * self.fsdp * self.expert

    def check_parts(self, n_parts):
        """Raises `UserError` unless `data` spans all TPU slices or GPU nodes."""
        if self.data % n_parts:
            wanted = f"must be a multiple of the {n_parts} slices or nodes, which it spans"
            self.refuse("data", wanted)

    def check(self, config):
        m, e, d = config.model, config.experts, config.model.d_model
        if m.unroll > 1 and self.fsdp > 1:
            wanted = "unrolled layers would keep gathered weights in memory; set 1"
            m.refuse("unroll", f"with mesh.fsdp={self.fsdp}, {wanted}")
        if self.tensor > 1 and m.qk_norm == "all":
            self.refuse("tensor", "splits heads, and model.qk_norm='all' spans all heads; set 1")
        splits = [
            ("expert", "experts.n_experts", e.n_experts),
            ("tensor", "model.n_heads", m.n_heads),
            ("tensor", "model.n_kv_heads", m.kv_heads),
            ("tensor", "data.seq_len", config.data.seq_len),
            ("tensor", "experts.d_wide" if e.low_rank else "experts.d_ffn", e.width(d)),
            ("tensor", "experts.d_shared", e.d_shared),
            ("tensor", "model.d_dense", m.d_dense or 0),
            ("fsdp", "model.d_model", d),
        ]
        if e.score_neurons is not None and e.score_neurons > e.d_ffn // self.tensor:
            most = f"must be at most experts.d_ffn / mesh.tensor = {e.d_ffn // self.tensor}"
            e.refuse("score_neurons", f"{most}, because one device stores all scoring neurons")
        if e.low_rank:
            splits.append(("fsdp", "experts.d_low", e.d_low))
        for axis, name, size in splits:
            hint = "; set experts.round_to to a multiple of it" if name == "experts.d_wide" else ""
            if size % getattr(self, axis):
                self.refuse(axis, f"must divide {name}={size}{hint}")
        rows = config.train.batch_size // config.train.accumulate
        if rows % self.batch_shards:
            wanted = (
                f"mesh.data * mesh.fsdp * mesh.expert = {self.batch_shards} must divide this number"
            )
            config.train.refuse("batch_size", f"a micro-batch has {rows} sequences; {wanted}")
        positions = config.data.seq_len // self.tensor
        if self.batch_shards * self.tensor > 1 and positions % config.balance.aux_stride:
            config.balance.refuse(
                "aux_tokens",
                f"on this mesh a device has {positions} positions of a sequence; the denominator "
                "of aux_tokens must divide this number",
            )
