"""What compiled programs send: from text by hand, and from real compilers."""

import json

import pytest
import toys

from prefix_distill.plan import cost
from prefix_distill.plan.cost import Allowed

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def module(entry: str, others: str = "") -> str:
  """A program of these lines, with arrays to use: %x f32[64], %y bf16[4,8]."""
  return f"""HloModule jit_f, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}}
{others}
ENTRY %main (x: f32[64], y: bf16[4,8]) -> f32[64] {{
  %x = f32[64]{{0:T(256)}} parameter(0), metadata={{op_name="x"}}
  %y = bf16[4,8]{{1,0:T(8,128)(2,1)S(1)}} parameter(1)
{entry}
  ROOT %out = f32[64]{{0}} copy(%x)
}}
"""


def read(entry: str, others: str = "", trips=None):
  return cost.collectives(module(entry, others), MESH, trips)


GROUPS = {
    "{{0,4},{1,5},{2,6},{3,7}}": ("data",),
    "{{5,7},{4,6},{2,0},{1,3}}": ("fsdp",),
    "{{0,1,2,3},{4,5,6,7}}": ("fsdp", "tensor"),
    "{{0,1,4,5},{2,3,6,7}}": ("data", "tensor"),
    "{{0,3},{1,2},{4,7},{5,6}}": ("?",),
    "{{0},{1},{2},{3},{4},{5},{6},{7}}": (),
    "{}": ("data", "fsdp", "tensor"),
    "[4,2]<=[8]": ("tensor",),
    "[4,2]<=[2,4]T(1,0)": ("data",),
    "[2,4]<=[2,2,2]T(1,0,2)": ("data", "tensor"),
    "[8,1]<=[8]": (),
    "[1,8]<=[8]": ("data", "fsdp", "tensor"),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": ("data", "fsdp"),
    "mesh['a'=2,'b'=2,'c'=2] {'b','c'}": ("fsdp", "tensor"),
    "mesh['a'=8] {'a':(1)2}": ("data",),
    "mesh['a'=8] {'a':(2)2}": ("fsdp",),
    "mesh['a'=4,'b'=2] {'a':(2)2,'b'}": ("fsdp", "tensor"),
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}": ("tensor",),
    "mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}": ("data", "fsdp"),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_of_devices_are_axes_of_the_mesh(groups):
  (found,) = read(
      "  %r = f32[64]{0} all-reduce(%x), channel_id=1,"
      f" replica_groups={groups}, use_global_device_ids=true, to_apply=%sum"
  )
  assert found.axes == GROUPS[groups]
  n = found.group_size
  assert n == 2 ** len(found.axes)
  assert found.sent == 2 * (n - 1) / n * 256


def test_an_unreadable_text_is_an_error():
  with pytest.raises(ValueError, match="no HLO"):
    cost.collectives("module @jit_f {}", MESH)
  with pytest.raises(ValueError, match="replica groups"):
    cost.read_groups("mesh['a'=2]", 2)


OVER = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}"
# A line; its kind, the bytes of the whole array, and what a device sends.
FORMS = {
    "  %r = f32[256]{0} all-gather(%x), OVER, dimensions={0}": (
        "all-gather",
        1024,
        768,
    ),
    "  %r = bf16[16,8]{1,0} all-gather(%y), OVER, dimensions={0}": (
        "all-gather",
        256,
        192,
    ),
    "  %r = (f32[64]{0}, f32[256]{0}) all-gather-start(%x), OVER, dimensions={0"
    "}\n  %d = f32[256]{0} all-gather-done(%r)": ("all-gather", 1024, 768),
    # Arrays that are sent together.
    "  %r = ((f32[64]{0}, bf16[4,8]{1,0}), (f32[256]{0}, bf16[16,8]{1,0}))"
    " all-gather-start(%x, %y), OVER, dimensions={0}\n"
    "  %d = (f32[256]{0}, bf16[16,8]{1,0}) all-gather-done(%r)": (
        "all-gather",
        1280,
        960,
    ),
    "  %r = (f32[64]{0}, bf16[4,8]{1,0}) all-reduce(%x, %y), OVER,"
    " to_apply=%sum": ("all-reduce", 320, 480),
    "  %r = f32[64]{0} all-reduce-start(%x), OVER, to_apply=%sum\n"
    "  %d = f32[64]{0} all-reduce-done(%r)": ("all-reduce", 256, 384),
    "  %r = f32[16]{0} reduce-scatter(%x), OVER, dimensions={0}"
    ", to_apply=%sum": (
        "reduce-scatter",
        256,
        192,
    ),
    "  %r = ((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%x), OVER,"
    " dimensions={0}, to_apply=%sum\n"
    "  %d = f32[16]{0} reduce-scatter-done(%r)": ("reduce-scatter", 256, 192),
    "  %r = f32[64]{0} all-to-all(%x), OVER, dimensions={0}": (
        "all-to-all",
        256,
        192,
    ),
    "  %r = bf16[4,8]{1,0} collective-broadcast(%y), OVER": (
        "collective-broadcast",
        64,
        64,
    ),
    "  %r = (f32[64]{0:S(1)}, f32[64]{0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)})"
    " collective-permute-start(%x), channel_id=1,"
    " source_target_pairs={{0,3},{3,0}}\n"
    "  %d = f32[64]{0} collective-permute-done(%r)": (
        "collective-permute",
        256,
        256,
    ),
    "  %i = s32[4]{0} constant({0,1,2,3})\n"
    "  %r = f32[64]{0} ragged-all-to-all(%x, %x, %i, %i, %i, %i), OVER": (
        "ragged-all-to-all",
        256,
        192,
    ),
}


@pytest.mark.parametrize("lines", FORMS)
def test_bytes_of_every_form(lines):
  (found,) = read(lines.replace("OVER", OVER))
  kind, size, sent = FORMS[lines]
  assert (found.kind, found.bytes, found.sent) == (kind, size, sent)
  assert (found.times, found.exact) == (1, True)
  assert found.axes == ("fsdp", "tensor")


def test_a_permutation_runs_over_the_axes_along_which_it_moves():
  def axes(pairs):
    (found,) = read(
        "  %r = f32[64]{0} collective-permute(%x), channel_id=1,"
        f" source_target_pairs={pairs}"
    )
    return found.axes

  assert axes("{{0,1},{1,0},{6,7},{7,6}}") == ("tensor",)
  assert axes("{{0,4},{4,0},{2,6}}") == ("data",)
  assert axes("{{0,4},{4,6}}") == ("data", "fsdp")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("pred", 64), ("s4", 32), ("f8e4m3fn", 64), ("c64", 512), ("u32", 256)],
)
def test_types(dtype, size):
  (found,) = read(
      f"  %z = {dtype}[64]{{0}} custom-call(), custom_call_target=\"z\"\n"
      f"  %r = {dtype}[64]{{0}} all-to-all(%z), {OVER}"
  )
  assert (found.dtype, found.bytes) == (dtype, size)


def loop(
    bound="%c", step="%one", direction="LT", config="", computed="%i", body=""
) -> str:
  """A loop's computations, over (i, x, bound), with an all-reduce inside."""
  return f"""
%body (p: (s32[], f32[64], s32[])) -> (s32[], f32[64], s32[]) {{
  %p = (s32[]{{:T(128)}}, f32[64]{{0}}, s32[]{{:T(128)}}) parameter(0)
  %one = s32[]{{:T(128)}} constant(1)
  %two = s32[]{{:T(128)}} constant(2)
  %j = s32[] get-tuple-element(%p), index=0
  %k = s32[]{{:T(128)S(6)}} copy(%j)
  %z = f32[64]{{0}} get-tuple-element(%p), index=1
  %b = s32[] get-tuple-element(%p), index=2
  %r = f32[64]{{0}} all-reduce(%z), {OVER}, to_apply=%sum, \
metadata={{op_name="jit(f)/while/body/dot" stack_frame_id=1}}
{body}
  %next = s32[] add(%k, {step})
  ROOT %t = (s32[], f32[64]{{0}}, s32[]) tuple(%next, %r, %b)
}}

%less (i.1: s32[], c.1: s32[]) -> pred[] {{
  %i.1 = s32[] parameter(0)
  %c.1 = s32[] parameter(1)
  ROOT %l = pred[] compare(%i.1, %c.1), direction={direction}
}}

%cond (q: (s32[], f32[64], s32[])) -> pred[] {{
  %q = (s32[], f32[64]{{0}}, s32[]) parameter(0)
  %c = s32[] constant(7)
  %i = s32[] get-tuple-element(%q), index=0
  %e = s32[] get-tuple-element(%q), index=2
  ROOT %f = pred[] fusion({computed}, {bound}), kind=kLoop, calls=%less
}}
"""


def enter(first=0, end="%n", config="") -> str:
  return f"""  %n = s32[] constant(9)
  %s = s32[] constant({first})
  %d = s32[] custom-call(), custom_call_target="unknown"
  %start = s32[] copy(%s)
  %in = (s32[], f32[64]{{0}}, s32[]) tuple(%start, %x, {end})
  %w = (s32[], f32[64]{{0}}, s32[]) while(%in), condition=%cond, body=%body,\
 metadata={{op_name="jit(f)/decode/while"}}{config}"""


@pytest.mark.parametrize(
    ("entry", "others", "times"),
    [
        (enter(), loop(), 7),
        (enter(first=3), loop(), 4),
        (enter(first=3), loop(step="%two"), 2),
        (enter(), loop(direction="LE"), 8),
        # Carried through the loop.
        (enter(), loop(bound="%e"), 9),
    ],
)
def test_trip_counts_out_of_conditions(entry, others, times):
  (found,) = read(entry, others)
  assert (found.times, found.exact) == (times, True)
  assert found.total == times * found.sent
  assert found.op_name == "jit(f)/while/body/dot"


def test_what_the_compiler_knows_of_a_loop_counts():
  config = (
      ', backend_config={"known_trip_count":{"n":"28"},'
      '"known_init_step":{"init":"0","step":"1"}}'
  )
  (found,) = read(enter(end="%d", config=config), loop(bound="%e"))
  assert (found.times, found.exact) == (28, True)


def test_a_loop_of_unknown_trip_count():
  text = enter(end="%d"), loop(bound="%e")
  (found,) = read(*text)
  assert (found.times, found.exact) == (1, False)
  assert str(found).startswith("at least 1x all-reduce")
  (found,) = read(*text, trips=5)
  assert (found.times, found.exact) == (5, True)
  # A loop that says itself is believed.
  (found,) = read(enter(), loop(), trips=5)
  assert found.times == 7
  # No bound at all, and one that is met before the first trip.
  (found,) = read(enter(first=8), loop(direction="GE"))
  assert not found.exact
  assert not read(enter(first=9), loop())


def test_loops_in_loops_and_conditions():
  inner = loop().replace("while/body", "inner")
  outer = """
%outer_body (o: (s32[], f32[64], s32[])) -> (s32[], f32[64], s32[]) {
  %o = (s32[], f32[64]{0}, s32[]) parameter(0)
  %oi = s32[] get-tuple-element(%o), index=0
  %ox = f32[64]{0} get-tuple-element(%o), index=1
  %on = s32[] get-tuple-element(%o), index=2
  %zero = s32[] constant(0)
  %in = (s32[], f32[64]{0}, s32[]) tuple(%zero, %ox, %on)
  %w = (s32[], f32[64]{0}, s32[]) while(%in), condition=%cond, body=%body
  %wx = f32[64]{0} get-tuple-element(%w), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%oi, %one)
  ROOT %t = (s32[], f32[64]{0}, s32[]) tuple(%next, %wx, %on)
}

%outer_cond (o: (s32[], f32[64], s32[])) -> pred[] {
  %o = (s32[], f32[64]{0}, s32[]) parameter(0)
  %oi = s32[] get-tuple-element(%o), index=0
  %ox = f32[64]{0} get-tuple-element(%o), index=1
  %three = s32[] constant(3)
  %live = f32[64]{0} all-reduce(%ox), channel_id=2, replica_groups={}, \
to_apply=%sum
  ROOT %l = pred[] compare(%oi, %three), direction=LT
}
"""
  entry = enter().replace("%cond", "%outer_cond")
  entry = entry.replace("%body", "%outer_body")
  # The bound of the inner loop comes through the outer one, 9.
  for bound, times in (("%c", 7), ("%e", 9)):
    found = read(entry, inner.replace("%i, %c)", f"%i, {bound})") + outer)
    assert [(x.times, x.exact, x.group_size) for x in found] == [
        (4, True, 8),
        (3 * times, True, 4),
    ]


def test_of_branches_the_dearer_counts():
  others = f"""
%yes (a.2: f32[64]) -> f32[64] {{
  %a.2 = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-to-all(%a.2), {OVER}
}}

%no (a.3: f32[64]) -> f32[64] {{
  %a.3 = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%a.3), {OVER}, to_apply=%sum
}}
"""
  condition = '  %p = pred[] custom-call(), custom_call_target="p"\n'
  branches = (
      "branch_computations={%yes, %no}",
      "true_computation=%no, false_computation=%yes",
  )
  for attributes in branches:
    (found,) = read(
        f"{condition}  %c = f32[64]{{0}} conditional(%p, %x, %x), {attributes}",
        others,
    )
    assert found.kind == "all-reduce"


def test_an_asynchronous_computation_counts_once():
  others = f"""
%wrapped (a.2: f32[64]) -> f32[64] {{
  %a.2 = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-to-all(%a.2), {OVER}
}}
"""
  entry = """  %s = ((f32[64]{0}), f32[64]{0}, u32[]) async-start(%x), \
calls=%wrapped, metadata={op_name="jit(f)/shuffle"}
  %u = ((f32[64]{0}), f32[64]{0}, u32[]) async-update(%s), calls=%wrapped
  %d = f32[64]{0} async-done(%u), calls=%wrapped"""
  (found,) = read(entry, others)
  assert (found.kind, found.times) == ("all-to-all", 1)
  assert found.op_name == "jit(f)/shuffle"


def test_equal_collectives_without_a_channel_are_two():
  line = " = f32[64]{0} all-reduce(%x), replica_groups={}, to_apply=%sum"
  assert len(read(f"  %r{line}\n  %s{line}")) == 2


# As a TPU's compiler writes a gather that runs beside two other operations.
_CHAIN = (
    "channel_id=6, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0},"
    ' use_global_device_ids=true, frontend_attributes={chain_id="0"},'
    ' metadata={op_name="jit(f)/dot"}, backend_config={"flag_configs":[],'
    '"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}'
)
ASYNC_FUSIONS = f"""
%fused_computation.39 (p0: f32[64]) -> (f32[64], f32[128], s32[2]) {{
  %p0 = f32[64]{{0:T(8,128)(2,1)S(1)}} parameter(0)
  %all-gather.34 = f32[128]{{0}} all-gather(%p0), {_CHAIN}
  ROOT %c = (f32[64]{{0}}, f32[128]{{0}}, s32[2]{{0:S(4)}}) \
custom-call(%all-gather.34), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.71 (p1: f32[64], p2: f32[128]) -> \
(f32[64], f32[128]) {{
  %p1 = f32[64]{{0}} parameter(0)
  %p2 = f32[128]{{0}} parameter(1)
  %all-gather.36 = f32[128]{{0}} all-gather(%p1), {_CHAIN}
  ROOT %t = (f32[64]{{0}}, f32[128]{{0}}) tuple(%p1, %p2)
}}

%fused_computation.41 (p3: f32[64], p4: f32[128]) -> f32[128] {{
  %p3 = f32[64]{{0}} parameter(0)
  %p4 = f32[128]{{0}} parameter(1)
  %all-gather.38 = f32[128]{{0}} all-gather(%p3), {_CHAIN}
  ROOT %c = f32[128]{{0}} custom-call(%p3, %p4, %all-gather.38), \
custom_call_target="AsyncCollectiveDone"
}}
"""


def test_a_gather_beside_other_work_counts_once():
  entry = """  %async-collective-start = (f32[64]{0}, f32[128]{0}, s32[2]{0}) \
fusion(%x), kind=kCustom, calls=%fused_computation.39
  %g0 = f32[64]{0} get-tuple-element(%async-collective-start), index=0
  %g1 = f32[128]{0} get-tuple-element(%async-collective-start), index=1
  %fusion.71 = (f32[64]{0}, f32[128]{0}) fusion(%g0, %g1), kind=kOutput, \
calls=%async_collective_fusion.71
  %g2 = f32[64]{0} get-tuple-element(%fusion.71), index=0
  %g3 = f32[128]{0} get-tuple-element(%fusion.71), index=1
  %async-collective-done = f32[128]{0} fusion(%g2, %g3), kind=kCustom, \
calls=%fused_computation.41"""
  (found,) = read(entry, ASYNC_FUSIONS)
  assert (found.kind, found.bytes, found.times) == ("all-gather", 512, 1)
  assert (found.axes, found.op_name) == (("fsdp",), "jit(f)/dot")


def test_a_fused_reduction_of_which_a_slice_is_kept_is_a_reduce_scatter():
  others = f"""
%all-reduce-scatter.clone.1 (input: f32[64]) -> f32[16] {{
  %input = f32[64]{{0}} parameter(0)
  %all-reduce.14 = f32[64]{{0}} all-reduce(%input), {OVER}, to_apply=%sum
  %table = u32[8]{{0}} constant({{...}})
  %id = u32[] partition-id()
  %at = u32[1]{{0}} dynamic-slice(%table, %id), dynamic_slice_sizes={{1}}
  %bitcast = u32[] bitcast(%at)
  %sixteen = u32[] constant(16)
  %offset = u32[] multiply(%bitcast, %sixteen)
  ROOT %r = f32[16]{{0}} dynamic-slice(%all-reduce.14, %offset), \
dynamic_slice_sizes={{16}}
}}
"""
  entry = (
      "  %f = f32[16]{0} fusion(%x), kind=kCustom,"
      ' calls=%all-reduce-scatter.clone.1, metadata={op_name="jit(f)/grad"}'
  )
  (found,) = read(entry, others)
  assert (found.kind, found.bytes) == ("reduce-scatter", 256)
  assert (found.sent, found.op_name) == (192, "jit(f)/grad")


def test_what_is_not_planned_is_said():
  found = read(
      f"  %r = f32[64]{{0}} all-reduce(%x), {OVER}, to_apply=%sum, "
      'metadata={op_name="jit(f)/loss"}\n'
      f"  %g = f32[256]{{0}} all-gather(%x), {OVER}, dimensions={{0}}\n"
      "  %a = f32[64]{0} all-to-all(%x), replica_groups={{0,3},{1,2}}\n"
      "  %n = f32[64]{0} all-reduce(%x), replica_groups=[8,1]<=[8], "
      "to_apply=%sum"
  )
  axes = ("data", "fsdp", "tensor")
  gathers = Allowed("all-gather", axes, 2**10, "the weights of a layer")
  sums = Allowed("all-reduce", axes, 2**20, "gradients")
  exchange = Allowed("all-to-all", ("?",), 2**20, "as it comes")
  assert not cost.audit(found, [gathers, sums, exchange], 0)
  (one,) = cost.audit(found, [gathers, exchange], 0)
  assert "1x all-reduce" in one and "fsdp x tensor" in one
  assert "jit(f)/loss" in one and one.endswith("which nothing plans.")
  (one,) = cost.audit(
      found, [Allowed("all-gather", axes, 1000, "a layer"), sums, exchange], 0
  )
  assert "all-gather" in one and "(a layer)" in one
  short = Allowed("all-reduce", ("tensor",), 2**20, "activations")
  assert len(cost.audit(found, [short], 0)) == 3
  # Sent are 384, 768 and 128 bytes, and none in groups of one.
  assert len(cost.audit(found, [short], negligible=384)) == 1


def test_known_collectives_of_programs_on_eight_devices():
  (printed,) = toys.finish(
      [toys.start("known_collectives.py", "cpu", devices=8)], seconds=240
  )
  assert printed.endswith("OK\n")


@pytest.mark.aot
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_known_collectives_of_programs_for_machines_elsewhere(platform):
  (printed,) = toys.finish(
      [toys.start("known_collectives.py", platform, devices=1)], seconds=500
  )
  assert printed.endswith("OK\n"), json.dumps(printed)
