"""Compares costs of optimised programs for TPUs and GPUs with counts by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from aoe_jax.moe.grouped_matmul import grouped_matmul, mosaic_gpu
from aoe_jax.planning import costs, hlo, kernel_costs
from aoe_jax.planning.hardware import CHIPS, topology_devices
from aoe_jax.planning.kernel_checks import with_gradients
from aoe_jax.planning.step_plan import read_program
from aoe_jax.sharding import replicated


def operations(function, *shapes):
    """Compiles `function` for a TPU and returns the operations of the program."""
    _, devices = topology_devices("v5e:2x2")
    mesh = Mesh(np.array(devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    here = replicated(mesh)
    with jax.set_mesh(mesh):
        args = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in shapes]
        _, text = hlo.compile_and_read(jax.jit(function).lower(*args))
    return costs.Program(text).operations


def total(found, name):
    return sum(o.times * getattr(o, name) for o in found)


@pytest.mark.slow
def test_loops_and_conditions():
    """A loop counts once per iteration, or as 0 if the number of iterations is unknown. A condition
    counts as its branch with most FLOPs.
    """

    def five(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def unknown(x, w, n):
        return jax.lax.fori_loop(0, n[0], lambda _, x: jnp.tanh(x @ w[0]), x)

    def product_or_zeros(x, w, n):
        return jax.lax.cond(n[0] > 0, lambda: x @ w[0], lambda: jnp.zeros_like(x))

    x, w, n = ((2048, 1024), jnp.bfloat16), ((5, 1024, 1024), jnp.bfloat16), ((1,), jnp.int32)
    product = 2 * 2048 * 1024 * 1024
    found = operations(five, x, w)
    assert total(found, "flops") == 5 * product
    # At least x and the weights of each product are read once, and the result is written once.
    least = 2 * (5 * 1024 * 1024 + 2 * 2048 * 1024)
    assert least <= total(found, "hbm_bytes") < 3 * least
    assert total(operations(unknown, x, w, n), "flops") == 0
    assert total(operations(product_or_zeros, x, w, n), "flops") == product


def test_narrow_arrays_are_padded_to_128_lanes():
    array = hlo.Array("f32", (4096, 8), "{1,0:T(8,128)}")
    assert array.bytes == 16 * 4 * 4096 * 8 and array.in_hbm
    assert not hlo.Array("f32", (4096, 8), "{1,0:T(8,128)S(1)}").in_hbm
    assert hlo.Array("token", (), "").bytes == 0 and hlo.Array("c64", (2,), "").bytes == 16


@pytest.mark.slow
def test_a_slice_reads_what_it_takes_and_an_update_writes_what_it_changes():
    def in_loop(stack, x):
        def update(stack, i):
            row = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(stack, jnp.tanh(row) + x, i, 0), None

        return jax.lax.scan(update, stack, jnp.arange(3))[0]

    found = operations(in_loop, ((64, 1024, 1024), jnp.float32), ((1024, 1024), jnp.float32))
    one = 4 * 1024 * 1024
    copy = 2 * 64 * one  # the argument must not be overwritten
    assert 3 * 2 * one <= total(found, "hbm_bytes") <= copy + 3 * 4 * one


@pytest.mark.slow
@pytest.mark.parametrize("d", [512, 16384])
def test_grouped_products_count_by_their_tiles(d):
    m, f, n_experts = 8192, 1024, 4

    def both(rows, weights, sizes, g):
        product = partial(grouped_matmul, backend="megablox")
        return with_gradients(product)((rows, weights), g, (sizes,))

    shapes = [((m, d), jnp.bfloat16), ((n_experts, d, f), jnp.bfloat16), ((n_experts,), jnp.int32)]
    shapes.append(((m, f), jnp.bfloat16))
    kernels = [o for o in operations(both, *shapes) if o.opcode == "tpu_custom_call"]
    assert len(kernels) == 3 and total(kernels, "flops") == 3 * 2 * m * d * f
    rows, weights, out = 2 * m * d, 2 * n_experts * d * f, 2 * m * f
    least = 3 * (rows + weights + out)
    # The depth 16384 is divided into tiles, so that weights are read for every tile of rows.
    assert (total(kernels, "hbm_bytes") > 1.5 * least) == (d == 16384)


COLLECTIVES = """HloModule step, num_partitions=16

%start (p: f32[1,1024]) -> (f32[1,1024], f32[16,1024]) {
  %p = f32[1,1024]{1,0} parameter(0)
  %all-gather.1 = f32[16,1024]{1,0} all-gather(%p), replica_groups=[1,16], chain_id="7"
  ROOT %started = (f32[1,1024]{1,0}, f32[16,1024]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (p: f32[1,1024]) -> f32[1,1024] {
  %p.1 = f32[1,1024]{1,0} parameter(0)
  %all-gather.2 = f32[16,1024]{1,0} all-gather(%p.1), replica_groups=[1,16], chain_id="7"
  ROOT %copy.9 = f32[1,1024]{1,0} copy(%p.1)
}

%all-reduce-scatter.3 (p: f32[16,1024]) -> f32[1,1024] {
  %p.2 = f32[16,1024]{1,0} parameter(0)
  %all-reduce.4 = f32[16,1024]{1,0} all-reduce(%p.2), replica_groups={}
  ROOT %cut = f32[1,1024]{1,0} slice(%all-reduce.4), slice={[0:1], [0:1024]}
}

ENTRY %main (a: f32[1,1024], b: f32[16,1024], n: s32[4]) -> f32[1,1024] {
  %a = f32[1,1024]{1,0} parameter(0)
  %b = f32[16,1024]{1,0} parameter(1)
  %copy-start = (f32[16,1024]{1,0S(1)}, f32[16,1024]{1,0}, u32[]) copy-start(%b)
  %copy-done = f32[16,1024]{1,0S(1)} copy-done(%copy-start)
  %fusion.1 = (f32[1,1024]{1,0}, f32[16,1024]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %fusion.2 = f32[1,1024]{1,0} fusion(%a), kind=kLoop, calls=%beside
  %sum = f32[16,1024]{1,0} all-reduce(%b), replica_groups=mesh['x'=4,'y'=2] {'x'}
  %moved = f32[16,1024]{1,0} collective-permute(%b), source_target_pairs={{0,1}}
  %one = (f32[1,1024], f32[16,1024]) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %two = (f32[1,1024], f32[16,1024]) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %work = f32[16,1024]{1,0} negate(%b)
  %n = s32[4]{0} parameter(2)
  %rows = f32[64,1024]{1,0} broadcast(%a), dimensions={}
  %ragged = f32[64,1024]{1,0} ragged-all-to-all(%b, %rows, %n, %n, %n, %n), \
replica_groups={{0,1,2,3}}
  %first = f32[16,1024]{1,0} all-gather-done(%one)
  %second = f32[16,1024]{1,0} all-gather-done(%two)
  %sum.1 = f32[16,1024]{1,0} all-reduce(%b), \
replica_groups=mesh['x'=2,'y'=8], device_ids=([8,2]T(1,0)) {'y'}
  ROOT %fusion.3 = f32[1,1024]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_collectives_count_once_and_by_their_kind():
    found = {o.name: o for o in costs.Program(COLLECTIVES).operations}
    size = 4 * 16 * 1024
    collectives = {
        name: (o.collective, o.sent_bytes, o.group_size, o.is_async)
        for name, o in found.items()
        if o.collective
    }
    assert collectives == {
        "all-gather.1": ("all-gather", size, 16, True),
        "sum": ("all-reduce", size, 4, False),
        "sum.1": ("all-reduce", size, 8, False),
        "moved": ("collective-permute", size, np.inf, False),
        "one": ("all-gather", size, 4, True),
        "two": ("all-gather", size, 4, True),
        "ragged": ("ragged-all-to-all", size, 4, False),
        "all-reduce.4": ("reduce-scatter", size, 16, False),
    }
    half = {o.name: o for o in costs.Program(COLLECTIVES, used=0.5).operations}
    assert half["ragged"].sent_bytes == size / 2 and half["sum"] == found["sum"]
    assert [o.name for o in found["one"].beside if not o.collective] == ["work", "rows"]
    assert found["two"].beside == ()  # the same work can hide only one collective
    assert found["copy-start"].hbm_bytes == size  # it copies to on-chip memory
    unknown = COLLECTIVES.replace("replica_groups={}", "devices=all")
    with pytest.raises(ValueError, match="all-reduce.4 names its devices in an unknown way"):
        _ = costs.Program(unknown).operations


# These instructions are from GPU programs of JAX 0.10 and 0.12. `%tuple#index` is an element of a
# tuple.
GPU = """HloModule step, is_scheduled=true, replica_count=1, num_partitions=8

%reduce (g: f32[128,256]) -> f32[16,256] {
  %g = f32[128,256]{1,0} parameter(0)
  ROOT %reduce_scatter = f32[16,256]{1,0} reduce-scatter(%g), channel_id=2, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%sum
}

%take (p: bf16[12,64,128], i: s32[]) -> bf16[1,64,128] {
  %p = bf16[12,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %slice = bf16[1,64,128]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,64,128}
}

%sort (p: bf16[1024,128]) -> (bf16[1024,128], s32[1024]) {
  %p.1 = bf16[1024,128]{1,0} parameter(0)
  %order = s32[1024]{0} iota(), iota_dimension=0
  ROOT %pair = (bf16[1024,128]{1,0}, s32[1024]{0}) tuple(%p.1, %order)
}

%add (p: bf16[32,128], i: s32[8], u: bf16[8,128]) -> bf16[32,128] {
  %p.2 = bf16[32,128]{1,0} parameter(0)
  %i.1 = s32[8]{0} parameter(1)
  %u = bf16[8,128]{1,0} parameter(2)
  ROOT %scatter = bf16[32,128]{1,0} scatter(%p.2, %i.1, %u), to_apply=%sum
}

%body (state: (s32[], bf16[2,256,4,64])) -> (s32[], bf16[2,256,4,64]) {
  %state = (s32[], bf16[2,256,4,64]{3,2,1,0}) parameter(0)
  %q = bf16[2,256,4,64]{3,2,1,0} get-tuple-element(%state), index=1
  %attend = (bf16[2,4,256,64]{3,1,2,0}, f32[2,4,256]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax"
  %y = bf16[2,4,256,64]{3,1,2,0} get-tuple-element(%attend), index=0
  %stats = f32[2,4,256]{2,1,0} get-tuple-element(%attend), index=1
  %back = (bf16[2,4,256,64]{3,1,2,0}, bf16[2,4,256,64]{3,1,2,0}, bf16[2,4,256,64]{3,1,2,0}, \
u8[0]{0}) custom-call(%q, %q, %q, %stats, %y, /*index=5*/%y), \
custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %one = s32[] constant(1)
  %next = s32[] add(%state#0, %one)
  %sum = bf16[2,256,4,64]{3,2,1,0} add(%state#1, %state#1)
  ROOT %both = (s32[], bf16[2,256,4,64]{3,2,1,0}) tuple(%next, %sum)
}

%condition (state: (s32[], bf16[2,256,4,64])) -> pred[] {
  %state.1 = (s32[], bf16[2,256,4,64]{3,2,1,0}) parameter(0)
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%state.1#0, %three), direction=LT
}

ENTRY %main (x: bf16[1024,128], w: bf16[2,16,256]) -> bf16[1024,256] {
  %x = bf16[1024,128]{1,0} parameter(0)
  %w = bf16[2,16,256]{2,1,0} parameter(1)
  %stack = bf16[12,64,128]{2,1,0} parameter(2)
  %q.1 = bf16[2,256,4,64]{3,2,1,0} parameter(3)
  %table = bf16[32,128]{1,0} parameter(4)
  %places = s32[8]{0} parameter(5)
  %updates = bf16[8,128]{1,0} parameter(6)
  %zero = s32[] constant(0)
  %gather = (bf16[2,16,256]{2,1,0}, bf16[2,128,256]{2,1,0}) all-gather-start(%w), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}
  %rows = (bf16[1024,128]{1,0}, s32[1024]{0}) fusion(%x), kind=kLoop, calls=%sort
  %gathered = bf16[2,128,256]{2,1,0} all-gather-done(%gather)
  %sizes = s32[2]{0} constant({512, 512})
  %out = bf16[1024,256]{1,0} custom-call(%sizes, %rows#0, %gathered), \
custom_call_target="mosaic_gpu_v2"
  %grads = bf16[2,128,256]{2,1,0} custom-call(%sizes, %sizes, %rows#0, %out), \
custom_call_target="mosaic_gpu_v2"
  %taken = ((bf16[12,64,128]{2,1,0}, s32[]), bf16[1,64,128]{2,1,0}, u32[]) \
fusion-start(%stack, %zero), kind=kLoop, calls=%take
  %done = bf16[1,64,128]{2,1,0} fusion-done(%taken)
  %scattered = bf16[32,128]{1,0} fusion(%table, %places, %updates), kind=kInput, calls=%add
  %start = (s32[], bf16[2,256,4,64]{3,2,1,0}) tuple(%zero, %q.1)
  %loop = (s32[], bf16[2,256,4,64]{3,2,1,0}) while(%start), condition=%condition, body=%body
  %gradient = f32[128,256]{1,0} parameter(7)
  %reduced = ((f32[128,256]{1,0}), f32[16,256]{1,0}) async-start(%gradient), calls=%reduce
  %going = ((f32[128,256]{1,0}), f32[16,256]{1,0}) async-update(%reduced)
  %part = f32[16,256]{1,0} async-done(%going)
  ROOT %result = bf16[1024,256]{1,0} copy(%out)
}
"""


def test_programs_for_gpus():
    found = {o.name: o for o in costs.Program(GPU).operations}
    size = 2 * 2 * 256 * 4 * 64
    assert (found["sum"].times, found["sum"].hbm_bytes) == (3, 2 * size)
    assert found["next"].hbm_bytes == 3 * 4
    known = GPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert {o.times for o in costs.Program(known).operations} == {1, 7}
    pairs = 2 * 4 * 256 * 257 / 2  # pairs of query and key positions
    assert (found["attend"].times, found["attend"].flops) == (3, 2 * 2 * pairs * 64)
    assert (found["back"].times, found["back"].flops) == (3, 5 * 2 * pairs * 64)
    rows, weights, out = 2 * 1024 * 128, 2 * 2 * 128 * 256, 2 * 1024 * 256
    assert found["out"].flops == found["grads"].flops == 2 * 1024 * 128 * 256
    assert found["out"].hbm_bytes == found["grads"].hbm_bytes == rows + weights + out
    half = {o.name: o for o in costs.Program(GPU, used=0.5).operations}
    assert half["grads"].hbm_bytes == (rows + out) / 2 + weights
    assert found["taken"].hbm_bytes == 2 * 2 * 64 * 128 + 4  # a matrix and its index
    assert found["scattered"].hbm_bytes == 4 * 8 + 3 * 2 * 8 * 128  # indices; rows read and written


# From a program for v5p, shortened: a TensorCore starts a custom call, in which a SparseCore starts
# the gather.
SPARSE = """HloModule step

%gather (p: f32[1000,128], i: s32[16]) -> f32[16,128] {
  %p = f32[1000,128]{1,0} parameter(0)
  %i = s32[16]{0} parameter(1)
  ROOT %taken = f32[16,128]{1,0} gather(%p, %i), offset_dims={1}, slice_sizes={1,128}
}

%inner (p: f32[1000,128], i: s32[16]) -> f32[16,128] {
  %p.1 = f32[1000,128]{1,0} parameter(0)
  %i.1 = s32[16]{0} parameter(1)
  ROOT %fusion.1 = f32[16,128]{1,0} fusion(%p.1, %i.1), kind=kCustom, calls=%gather, \
metadata={op_name="jit(step)/dispatch/gather"}
}

%outer (p: f32[1000,128], i: s32[16]) -> f32[16,128] {
  %p.2 = f32[1000,128]{1,0} parameter(0)
  %i.2 = s32[16]{0} parameter(1)
  %start.2 = ((f32[1000,128]{1,0}, s32[16]{0}), f32[16,128]{1,0}, u32[]) \
async-start(%p.2, %i.2), calls=%inner
  ROOT %done.2 = f32[16,128]{1,0} async-done(%start.2)
}

%started (p: f32[1000,128], i: s32[16]) -> f32[16,128] {
  %p.3 = f32[1000,128]{1,0} parameter(0)
  %i.3 = s32[16]{0} parameter(1)
  ROOT %call.3 = f32[16,128]{1,0} custom-call(%p.3, %i.3), custom_call_target="TODO(b/522284627)", \
called_computations={%outer}
}

ENTRY %main (p: f32[1000,128], i: s32[16]) -> f32[16,128] {
  %p.4 = f32[1000,128]{1,0} parameter(0)
  %i.4 = s32[16]{0} parameter(1)
  %start.4 = ((f32[1000,128]{1,0}, s32[16]{0}), f32[16,128]{1,0}, u32[]) \
async-start(%p.4, %i.4), calls=%started
  ROOT %done.4 = f32[16,128]{1,0} async-done(%start.4)
}
"""


def test_a_gather_on_a_sparse_core_reads_what_it_takes():
    (gather,) = costs.Program(SPARSE).operations
    assert gather.op_name == "jit(step)/dispatch/gather"
    assert gather.hbm_bytes == 2 * 4 * 16 * 128 + 4 * 16  # rows read and written; indices


def test_cycles_that_the_compiler_does_not_know():
    """It states 2^64 - 1."""
    for stated, cycles in ((700, 700), (2**64 - 1, None)):
        config = f', backend_config={{"estimated_cycles":"{stated}"}}'
        program = "ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n"
        program += f"  ROOT %b = f32[8]{{0}} negate(%a){config}\n}}\n"
        (operation,) = costs.Program(f"HloModule step\n\n{program}").operations
        assert operation.cycles == cycles


def test_work_beside_a_collective_hides_its_time():
    chip = CHIPS["h100"]
    found = {o.name: o for o in costs.Program(GPU).operations}
    gather, rows = found["gather"], found["rows"]
    assert gather.sent_bytes == 2 * 2 * 128 * 256 and gather.group_size == 8
    network = gather.sent_bytes * 7 / 8 / chip.link_bandwidth
    work = rows.hbm_bytes / chip.hbm_bandwidth
    assert 0 < work < network
    assert costs.seconds(gather, chip) == pytest.approx(network - work)
    # No work hides the reduce-scatter; it sends as many bytes as the gather.
    assert costs.seconds(found["reduce_scatter"], chip) == pytest.approx(network)


SPLASH = """HloModule step

ENTRY %main (mask: s32[64], q: bf16[8,512,128], k: bf16[8,512,128]) -> bf16[8,512,128] {
  %mask = s32[64]{0} parameter(0)
  %q = bf16[8,512,128]{2,1,0} parameter(1)
  %k = bf16[8,512,128]{2,1,0} parameter(2)
  ROOT %splash_mha_fwd.1 = bf16[8,512,128]{2,1,0} custom-call(%mask, %q, %k, %k), \
custom_call_target="tpu_custom_call"
}
"""


def test_an_unknown_kernel_counts_by_its_operands(caplog):
    """Another program's kernel of the same name has a mask of one axis."""
    found = read_program(SPLASH, CHIPS["v5e"], ())
    size = 4 * 64 + 3 * 2 * 8 * 512 * 128
    assert found["hbm_traffic_bytes"] == size and found["flops"] == 0
    alone = {"operations": 1, "seconds_at_peaks": size / CHIPS["v5e"].hbm_bandwidth}
    assert found["operations"] == 1 and found["without_products"] == alone
    assert "only operands and results count: splash_mha_fwd" in caplog.text


@pytest.mark.parametrize(("generation", "filled"), [("v5p", 1), ("v6e", 0.5)])
def test_heads_of_128_fill_half_of_a_matrix_unit_of_256(generation, filled):
    found = read_program(
        SPLASH.replace("s32[64]", "s32[1,1]").replace("512", "8192"), CHIPS[generation], ()
    )
    assert found["seconds_at_peaks"] == found["flops"] / CHIPS[generation].flops / filled
    assert found["operations"] == 1 and found["without_products"]["operations"] == 0


def test_kernels_count_by_the_blocks_of_their_operands():
    """The block sizes differ from our settings: 2 by 4 blocks of scores, tiles of 512 rows."""
    q = hlo.Array("bf16", (1, 2, 2048, 128), "{3,2,1,0}")
    mask = hlo.Array("s8", (1, 2, 4), "{2,1,0}")
    flops, traffic, _ = kernel_costs.splash_cost("splash_mha_fwd", [mask, mask, q, q, q], [q])
    met = 2 + 4  # of 8 pairs of blocks are computed
    assert flops == 2 * 2 * 2 * 2048**2 * 128 * met / 8
    assert traffic == q.bytes * (2 + 2 * met / 4)  # q and y once; k and v per computed block
    _, traffic, _ = kernel_costs.splash_cost("splash_mha_dkv", [mask, mask, q, q, q, q], [q, q])
    # k, v and their gradients once; q and dy per computed block
    assert traffic == q.bytes * (4 + 2 * met / 2)

    def product(d, f, n_experts):
        shapes = (8192, d), (n_experts, d, f), (8192, f)
        return [hlo.Array("bf16", dims, "") for dims in shapes]

    rows, weights, out = product(1024, 512, 4)
    scalar, offsets, listed = (hlo.Array("s32", dims, "") for dims in [(), (5,), (16 + 3,)])
    given = [scalar, offsets, listed, listed, scalar, rows, weights]
    flops, traffic, occupied = kernel_costs.megablox_cost("gmm", given, [out])
    assert flops == 2 * 8192 * 1024 * 512 and occupied == flops * 19 / 16
    assert traffic == rows.bytes + weights.bytes + out.bytes
    of_used = partial(kernel_costs.megablox_cost, used=0.5)
    flops, traffic, _ = of_used("gmm", given, [out])
    assert flops == 8192 * 1024 * 512
    assert traffic == (rows.bytes + out.bytes) / 2 + weights.bytes
    *_, occupied = of_used("gmm", given, [out])
    assert occupied == flops * (8 + 3) / 8
    flops, traffic, _ = of_used("tgmm", [*given[:-2], rows, out], [weights])
    assert flops == 8192 * 1024 * 512
    assert traffic == (rows.bytes + out.bytes) / 2 + weights.bytes

    # Two tiles of 1,536 columns: rows are read twice, and no other array.
    rows, weights, out = product(768, 3072, 4)
    row_weight = hlo.Array("f32", (1, 8192), "")
    given = [scalar, offsets, listed, listed, rows, weights, out]
    flops, traffic, _ = kernel_costs.swiglu_cost("swiglu", [*given, row_weight], [out])
    assert flops == 2 * 8192 * 768 * 3072
    assert traffic == 2 * rows.bytes + row_weight.bytes + weights.bytes + 2 * out.bytes
    flops, traffic, _ = kernel_costs.swiglu_cost("gmm_add", given, [out], used=0.5)
    assert flops == 8192 * 768 * 3072
    assert traffic == rows.bytes + weights.bytes + out.bytes

    # With wide experts, rows are read once for each pass over 16 of the 112 weight blocks of 1 MiB.
    rows, weights, out = product(4096, 14336, 8)
    flops, traffic, _ = kernel_costs.mosaic_gpu_cost("mosaic_gpu_v2", [rows, weights], [out])
    assert flops == 2 * 8192 * 4096 * 14336
    assert mosaic_gpu.blocks_at_once(4096, 14336) == 16
    assert traffic == 7 * rows.bytes + weights.bytes + out.bytes
    # Weight gradients leave out rows without an expert.
    given = [rows, out], [weights]
    flops, traffic, _ = kernel_costs.mosaic_gpu_cost("mosaic_gpu_v2", *given, used=0.5)
    assert flops == 8192 * 4096 * 14336
    assert traffic == (rows.bytes + out.bytes) / 2 + weights.bytes


def test_likely_seconds():
    chip = CHIPS["v5e"]

    def milliseconds(shape=(), estimate="likely", opcode="fusion", **fields):
        operation = costs.Operation("a", opcode, "", **fields)
        return pytest.approx(1e3 * costs.seconds(operation, chip, shape, estimate))

    work = {"hbm_bytes": 0.82e9, "flops": 1e9, "occupied_flops": 1e9}
    kernel = {"opcode": "tpu_custom_call", "occupied_flops": chip.flops / 1e3}
    found = {
        estimate: [
            milliseconds(estimate=estimate, **operation)
            for operation in (
                work,
                {"cycles": 3e6, **work},
                {"opcode": "broadcast", "cycles": 3e6, **work},
                kernel,
            )
        ]
        for estimate in costs.ESTIMATES
    }
    assert found == {"peaks": [1, 1, 1, 1], "likely": [1, 2, 1, 1.25], "cycles": [1, 2, 2, 1]}
    sums = {"collective": "all-reduce", "sent_bytes": 200e6, "group_size": 2}
    assert milliseconds(**sums) == 1 and milliseconds(is_async=True, **sums) == 0
    assert milliseconds((4, 4), **sums) == 4  # it uses one of four links
    moved = {"collective": "collective-permute", "sent_bytes": 50e6, "group_size": np.inf}
    assert milliseconds((4, 4), **moved) == 1


def test_operations_belong_to_the_innermost_scope():
    in_layer = "layers/experts/shard_map/checkpoint"
    for op_name, want in {
        "jit(train_step)/jvp(Decoder.features)/while/body/layers/attention/dot": "attention",
        "jit(train_step)/transpose(jvp(loss))/shard_map/while/body/dot": "loss",
        f"jit(f)/{in_layer}/dispatch/select_n": "dispatch",
        f"jit(f)/{in_layer}/experts/cond/jit(gmm)/pallas_call": "experts",
        "jit(train_step)/add": "other",
    }.items():
        assert costs.scope(costs.Operation("a", "fusion", op_name)) == want
