"""What scripts/benchmark programs reads from a compiled text, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpg.training.algorithm import ALGORITHMS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import benchmark_programs as programs  # noqa: E402
import compiled_text  # noqa: E402
import pods  # noqa: E402

# Five trips, known to the compiler, each with a kernel and a choice between two kernels and one; at most
# seven of a loop whose bound enters in its tuple and whose condition asks more; a sum over chips.
GPU = """HloModule jit_f, is_scheduled=true

FileNames
1 "ROOT/jaxpg/rollout/stream.py"
2 "/elsewhere/library.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (p: f32[4,1000], i: s32[]) -> f32[1,1000] {
  %p = f32[4,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,1000]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,1000}
}

%one (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%p)
}

%two (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %copy.2 = f32[8]{0} copy(%p)
  ROOT %copy.3 = f32[8]{0} copy(%copy.2)
}

%body (s: (s32[], f32[4,1000], f32[8])) -> (s32[], f32[4,1000], f32[8]) {
  %s = (s32[], f32[4,1000]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %big = f32[4,1000]{1,0} get-tuple-element(%s), index=1
  %x = f32[8]{0} get-tuple-element(%s), index=2
  %row = f32[1,1000]{1,0} fusion(%big, %i), kind=kLoop, calls=%fused, metadata={op_name="f/cut" stack_frame_id=2}
  %which = pred[] bitcast(%row)
  %y = f32[8]{0} conditional(%which, %x, %x), true_computation=%one, false_computation=%two
  ROOT %t = (s32[], f32[4,1000]{1,0}, f32[8]{0}) tuple(%i, %big, %y)
}

%condition (s: (s32[], f32[4,1000], f32[8])) -> pred[] {
  %s = (s32[], f32[4,1000]{1,0}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%episode (s: (s32[], pred[], s32[])) -> (s32[], pred[], s32[]) {
  %s = (s32[], pred[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %alive = pred[] get-tuple-element(%s), index=1
  %end = s32[] get-tuple-element(%s), index=2
  %next = s32[] copy(%i)
  ROOT %t = (s32[], pred[], s32[]) tuple(%next, %alive, %end)
}

%both (i: s32[], end: s32[], alive: pred[]) -> pred[] {
  %i = s32[] parameter(0)
  %end = s32[] parameter(1)
  %alive = pred[] parameter(2)
  %less = pred[] compare(%i, %end), direction=LT
  ROOT %and = pred[] and(%less, %alive)
}

%going (s: (s32[], pred[], s32[])) -> pred[] {
  %s = (s32[], pred[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %alive = pred[] get-tuple-element(%s), index=1
  %end = s32[] get-tuple-element(%s), index=2
  ROOT %ask = pred[] fusion(%i, %end, %alive), kind=kLoop, calls=%both
}

ENTRY %main (a: f32[4,1000], x: f32[8], alive: pred[]) -> f32[8] {
  %a = f32[4,1000]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %alive = pred[] parameter(2)
  %nought = s32[] constant(0)
  %seven = s32[] constant(7)
  %start = (s32[], f32[4,1000]{1,0}, f32[8]{0}) tuple(%nought, %a, %x)
  %loop = (s32[], f32[4,1000]{1,0}, f32[8]{0}) while(%start), condition=%condition, body=%body, metadata={op_name="f/while" stack_frame_id=2}, backend_config={"known_trip_count":{"n":"5"}}
  %first = (s32[], pred[], s32[]) tuple(%nought, %alive, %seven)
  %episodes = (s32[], pred[], s32[]) while(%first), condition=%going, body=%episode
  %out = f32[8]{0} get-tuple-element(%loop), index=2
  %begun = f32[8]{0} all-reduce-start(%out), to_apply=%sum
  ROOT %done = f32[8]{0} all-reduce-done(%begun)
}
""".replace("ROOT/", f"{ROOT}/")  # noqa: E501


def test_kernels_and_round_trips_are_multiplied_by_the_trips_of_their_loops():
    block = programs.measured(programs.parsed(GPU), programs.CHIPS["h100"])
    total = block.once
    # The sum; five times the slice and the dearer branch; seven times a copy and its condition.
    assert total.operations == 1 + 5 * (1 + 2) + 7 * (1 + 1)
    assert total.round_trips == 5 * 1 + 7
    assert (total.collectives, total.collective_bytes) == (1, 32)
    loop, episodes = block.inner
    assert (loop.trips, loop.exact, episodes.trips, episodes.exact) == (5, True, 7, False)
    assert loop.name == "loop at rollout/stream.py:12"  # called from there, by way of a library


ANSWERS = """HloModule jit_h, is_scheduled=true

%body (s: (s32[], pred[257])) -> (s32[], pred[257]) {
  %s = (s32[], pred[257]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ahead = pred[257]{0} get-tuple-element(%s), index=1
  %next = s32[] copy(%i)
  ROOT %t = (s32[], pred[257]{0}) tuple(%next, %ahead)
}

%answer (ahead: pred[257], i: s32[]) -> pred[1] {
  %ahead = pred[257]{0} parameter(0)
  %i = s32[] parameter(1)
  %nought = s32[] constant(0)
  %before = pred[] compare(%i, %nought), direction=LT
  ROOT %cut = pred[1]{0} dynamic-slice(%ahead, %i), dynamic_slice_sizes={1}
}

%condition (s: (s32[], pred[257])) -> pred[] {
  %s = (s32[], pred[257]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %ahead = pred[257]{0} get-tuple-element(%s), index=1
  %ask = pred[1]{0} fusion(%ahead, %i), kind=kLoop, calls=%answer
  ROOT %going = pred[] bitcast(%ask)
}

ENTRY %main (i: s32[], ahead: pred[257]) -> (s32[], pred[257]) {
  %i = s32[] parameter(0)
  %ahead = pred[257]{0} parameter(1)
  %start = (s32[], pred[257]{0}) tuple(%i, %ahead)
  ROOT %loop = (s32[], pred[257]{0}) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_that_reads_its_answers_ends_with_the_last_of_them():
    (loop,) = programs.measured(programs.parsed(ANSWERS), programs.CHIPS["h100"]).inner
    assert (loop.trips, loop.exact) == (256, False)


# As XLA writes it: seven trips that the compiler knows are a graph of two kernels each, and nine at most are
# asked for by two kernels of a condition, with a choice of a copy or two kernels in each; then a graph.
THUNKS = """001: kCopy  [source       | next=004 (3)] kCopy
004: kWhile [prev=003 (1) | sink        ]   
condition:
    005: kCustomKernel [source       | next=006 (1)] input_reduce_fusion grid: [1, 1, 1]
    006: kCustomKernel [prev=005 (1) | sink        ] loop_and_fusion grid: [1, 1, 1]
  body:
    012: kConditional  [prev=008 (1) | next=013 (1)]       
      false_branch:
        009: kCopy         [source       | next=010 (1)] kCopy
      true_branch:
        010: kCustomKernel [source       | next=011 (1)] fusion_1
        011: kCustomKernel [prev=010 (1) | sink        ] fusion_2
    014: kWhile        [prev=013 (1) | next=020 (1)]       
condition:
        015: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
      body:
        000: kCommandBuffer [source | sink] 
            016: kCustomKernel       [source | sink        ] loop_add_fusion_2 grid: [1, 1, 1]
            017: kDynamicSliceFusion [source | sink        ] params=1, results=1
                018: kCopy [source | sink] kCopy
    020: kConditional  [prev=014 (1) | sink        ]       
      branch_0:
      branch_1:
    021: kCopy         [prev=020 (1) | sink        ] kCopy
000: kCommandBuffer [prev=004 (1) | sink        ] 
    022: kWhile        [prev=013 (1) | next=020 (1)]       
condition:
        023: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
      body:
        024: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1]
"""


def test_a_graph_is_launched_once_whatever_loops_are_in_it(monkeypatch):
    names = {4: "outer", 14: "inner", 22: "whole"}
    trips = {"outer": (9, False, False), "inner": (7, True, True), "whole": (99, True, True)}
    metadata = "".join(
        f'  thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {i}\n  }}\n'
        for i, name in names.items()
    )
    operation = compiled_text.Operation("", "", "while", "", "", False)
    body = {name: operation._replace(name=name) for name in trips}
    monkeypatch.setattr(compiled_text, "_trips", lambda text, body, loop: trips[loop.name])
    text = compiled_text.Text({"main": body}, "main", {})
    started = compiled_text.launches(text, THUNKS, metadata)
    # A copy; nine times the condition and its answer, a choice and its dearer branch, seven graphs, a choice
    # of nothing and a copy; the last graph.
    assert started == 1 + 9 * (2 + 1 + 1 + 2 + 7 * 1 + 1 + 1) + 1


def test_a_slice_reads_only_its_part():
    text = programs.parsed(GPU)
    body = text.computations["body"]
    assert compiled_text._moved(text, body, body["row"]) == 2 * 4000 + 4
    assert (
        compiled_text._moved(text, text.computations["two"], text.computations["two"]["copy.2"])
        == 64
    )


TPU = """HloModule jit_g, is_scheduled=true

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%s), index=1
  %y = f32[8]{0:T(128)} copy(%x), backend_config={"window_config":{"estimated_cycles":"1800"}}
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%i, %y)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %five), direction=LT
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0:T(128)} parameter(0)
  %nought = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%nought, %x)
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%start), condition=%condition, body=%body
}
"""


def test_estimated_cycles_are_multiplied_by_trips_read_from_the_condition():
    block = programs.measured(programs.parsed(TPU), programs.CHIPS["v5e"])
    assert block.inner[0].exact
    assert block.once[:3] == (5, 9000, 0)
    assert block.once.seconds == pytest.approx(9000 / 1.5e9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--chip", "v7"], "unknown chip 'v7'; use v5e, v6e, h100"),
        (["--case", "ppo-8x16"], "unknown case 'ppo-8x16'; use ppo-8x16x64"),
        (["--explain", "evaluate"], "unknown case 'evaluate'; use evaluate-1024"),
        (["--chips", "v5e"], "unknown chips 'v5e'; use v5e:AxB or h100:HOSTSxCHIPS"),
        (["--precision", "hihgest"], "unknown precision 'hihgest'; use default, high or highest"),
    ],
)
def test_an_unknown_name_is_one_line(arguments, said):
    with pytest.raises(SystemExit) as caught:
        programs.main(arguments)
    assert said in str(caught.value.code) and "\n" not in str(caught.value.code)


def test_chips_that_wait_are_named():
    """A slice of 256 chips, and 8 hosts of 8; a row is below a half where messages take longer than work."""
    assert (pods.pod("v5e:16x16").size, pods.pod("h100:8x8").size) == (256, 64)
    assert pods.pod("h100:1x8").link.latency < pods.pod("h100:8x8").link.latency
    row = {
        "chips": "v5e:4x4",
        "split": "environments",
        "lanes": 64,
        "messages": 35.0,
        "bytes": 586800.0,
    }
    page = pods._page([row | {"seconds": 4e-3, "efficiency": x} for x in (0.9, 0.4)])
    assert "| v5e:4x4 | environments | 64 | 35 | 586.8 kB | 4.0 ms | 0.40 |" in page
    assert "waiting on v5e:4x4 with 64 environments" in " ".join(page.split())
    assert max(len(x) for x in page.splitlines()) <= 120


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (40.81G) exceeds available HBM (15.75G).",
            ("40.81G", "15.75G"),
        ),
        ("Ran out of memory in hbm. Used 20.5G of 15.75G hbm. Exceeded by 4.75G", ("20.5G", "15.75G")),
        ("INTERNAL: a bug", None),
    ],
)  # fmt: skip
def test_a_compiler_says_how_much_memory_is_lacking(message, sizes):
    assert programs.too_large(message) == sizes


def said_by(arguments):
    with pytest.raises(SystemExit) as caught:
        programs.main(arguments)
    assert "\n" not in str(caught.value.code)
    return str(caught.value.code)


def test_a_file_that_cannot_be_written_is_known_before_anything_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "installed", lambda chip: pytest.fail("went on"))
    file = tmp_path / "none" / "rows.json"
    assert f"cannot write {file}: No such file or directory" in said_by(["--json", str(file)])
    monkeypatch.setattr(programs, "installed", lambda chip: sys.exit("went on"))
    assert said_by(["--json", str(tmp_path / "rows.json")]) == "went on"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chip", "stderr", "said"),
    [
        (
            "v5e",
            "WARNING: slow\nERROR: No matching distribution found for libtpu==0.0.42.*\n",
            "the compiler for a TPU does not install: ERROR: No matching distribution found for libtpu",
        ),
        (
            "h100",
            "  ERROR: Could not find a version of jax-cuda12-plugin\njaxpg: the installation failed\n",
            "the compiler for h100 does not install: ERROR: Could not find a version of jax-cuda12",
        ),
        ("h100", "", "the compiler for h100 does not install: no reason given"),
    ],
)
def test_a_compiler_that_does_not_install_is_one_line(chip, stderr, said, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(programs.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(programs, "find_spec", lambda name: None)
    monkeypatch.setattr(programs.sys, "prefix", str(tmp_path))
    monkeypatch.setattr(programs.platform, "system", lambda: "Linux")
    monkeypatch.setattr(programs.platform, "machine", lambda: "x86_64")
    assert said in said_by(["--chip", chip])
    monkeypatch.setattr(programs.platform, "machine", lambda: "arm64")
    if chip == "v5e":
        assert "on Linux on x86-64 only" in said_by(["--chip", chip])


@pytest.mark.slow
def test_rows_are_written_and_explained_unless_the_chip_is_too_small(tmp_path, monkeypatch, capsys):
    tpu_compiler(monkeypatch)
    small = {"small": lambda own: programs.budgeted("gpomdp_continuing", "CartPole-v1")}
    monkeypatch.setattr(programs, "CASES", small)
    file = tmp_path / "rows.json"
    programs.main(["--json", str(file), "--explain", "small", "--peers"])
    shown = capsys.readouterr().out
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert (found["chip"], found["peers"], row["case"]) == ("v5e", [], "small")
    assert "rejax is left out: it has none of these cases, but ppo-1x4096x128" in shown
    total = sum(x["operations"] * x["trips"] for x in row["loops"] if x["depth"] < 2)
    assert row["operations"] >= total > 0 and row["megacycles"] > 0
    # Operations are explained by the lines of this package that asked for them.
    assert re.search(r"\d+ cycles +fusion +f32\[8.* rollout/str\w+\.py:\d+ ", shown)
    chips = {"v5e": programs.CHIPS["v5e"]._replace(memory=1e3)}
    monkeypatch.setattr(programs, "CHIPS", chips)
    assert re.search(
        r"small needs \S+ GB of memory and the chip has 1e-06 GB; leave it out", said_by([])
    )


BUDGETS = json.loads(programs.BUDGETS.read_text())


def overspent(budget: list, spent: list) -> list[str]:
    """What costs 5 % more than its budget: loop by loop if they are the same loops, and in all."""
    same = [x for x, *_ in budget] == [re.sub(r":\d+", "", x) for x, *_ in spent]
    return [
        f"{name.strip()} x{trips}: {operations} operations and {kilocycles} kcycles, "
        f"budget {most[2]} and {most[3]}"
        for most, (name, trips, operations, kilocycles) in list(zip(budget, spent, strict=False))[
            : len(spent) if same else 1
        ]
        if operations > 1.05 * most[2] or kilocycles > 1.05 * most[3] or trips > most[1]
    ]


def test_what_is_over_its_budget_is_named():
    budget = [["in all", 1, 100, 200.0], ["  loop at a.py", 8, 10, 20.0]]
    spent = [["in all", 1, 100, 200.0], ["  loop at a.py:7", 8, 10, 21.0]]
    assert overspent(budget, spent) == []
    dearer = [spent[0], ["  loop at a.py:7", 8, 11, 20.0]]
    said = "loop at a.py:7 x8: 11 operations and 20.0 kcycles, budget 10 and 20.0"
    assert overspent(budget, dearer) == [said]
    # Other loops: only the sum is held to its budget.
    assert overspent(budget, [spent[0], ["  loop at b.py:7", 8, 90, 20.0]]) == []
    assert overspent(budget, [["in all", 1, 100, 211.0]]) != []


@pytest.mark.slow
@pytest.mark.parametrize("environment", programs.ENVIRONMENTS)
@pytest.mark.parametrize("row", ALGORITHMS)
def test_a_program_keeps_to_its_budget(row, environment, monkeypatch):
    tpu_compiler(monkeypatch)
    if (here := programs.version("libtpu")) != BUDGETS["libtpu"]:
        pytest.skip(f"budgets are of libtpu {BUDGETS['libtpu']}, and this is {here}")
    spent = programs.spending(row, environment)
    budget = BUDGETS.get(f"{row} {environment}", [["in all", 1, 0, 0.0]])
    over = overspent(budget, spent)
    loops = "\n".join(
        f"{x} x{n}: {count} operations, {cycles} kcycles" for x, n, count, cycles in spent
    )
    advice = "scripts/benchmark programs --budgets rewrites the table, if that is meant"
    assert not over, f"{'; '.join(over)}; {advice}; now\n{loops}"


def tpu_compiler(monkeypatch):
    """Puts a TPU's compiler on the path, or skips the test."""
    for name, value in programs.QUIET.items():
        monkeypatch.setenv(name, value)
    try:
        programs.libtpu(install=False)
    except FileNotFoundError as reason:
        pytest.skip(
            f"a TPU's compiler is missing: {reason}; scripts/test installs it on Linux on x86-64"
        )
