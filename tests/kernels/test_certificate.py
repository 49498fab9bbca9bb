"""The offline certificate: its arithmetic against values worked out by hand, what it counts on kernels made to be bad, and the
gate itself: no kernel of the table spills, misses the tensor cores, or needs more than a GPU has, under two Tritons.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vatt.benchmarks import certificate_cuda
from vatt.benchmarks.certificate import EVERY, CertificateError, Job, certify, make_row, plan, show, violations
from vatt.kernels.contract import Shape, row
from vatt.kernels.gpu.occupancy import resident_blocks
from vatt.kernels.gpu.sass import Usage, counts, functions, usages
from vatt.kernels.gpu.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
OLDEST = ROOT / "build" / "triton-3.6.0"  # beside the pinned one: made by `make test`

# ---- occupancy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "threads", "registers", "shared", "columns", "blocks"),
    [
        ("sm_90", 128, 32, 0, 0, 16),  # 2048 threads / 128; registers would allow 64 warps / 4 = 16 as well
        ("sm_90", 128, 40, 0, 0, 12),  # 40 x 32 = 1280 a warp: 12 of a partition's 16384, 48 warps
        ("sm_90", 128, 41, 0, 0, 10),  # 1312 becomes 1536: 10 a partition, 40 warps
        ("sm_80", 256, 255, 0, 0, 1),  # 8160 becomes 8192: 2 a partition, 8 warps
        ("sm_80", 512, 255, 0, 0, 0),  # the same 8 warps are not 16
        ("sm_90", 128, 168, 0, 0, 3),  # 5376 a warp: 3 a partition, 12 warps
        ("sm_90", 32, 16, 0, 0, 32),  # blocks of one warp: at most 32
        ("sm_90", 33, 16, 0, 0, 32),  # two warps: 64 of 64
        ("sm_90", 65, 16, 0, 0, 21),  # three warps: 2048 / 96
        ("sm_90", 128, 32, 102_400, 0, 2),  # 233472 / (102400 + 1024)
        ("sm_80", 128, 32, 102_400, 0, 1),  # 167936 / 103424
        ("sm_90", 128, 32, 37_888, 0, 6),  # 38912 x 6 is exactly 233472
        ("sm_90", 128, 32, 37_889, 0, 5),  # and one more byte is a unit of 128 more
        ("sm_90", 128, 32, 232_448, 0, 1),
        ("sm_90", 128, 32, 232_449, 0, 0),
        ("sm_80", 128, 32, 166_912, 0, 1),
        ("sm_80", 128, 32, 166_913, 0, 0),
        ("sm_100", 128, 32, 0, 256, 2),  # 512 columns of tensor memory
        ("sm_100", 128, 32, 0, 65, 5),  # given in units of 32: 512 / 96
    ],
)
def test_resident_blocks(target: str, threads: int, registers: int, shared: int, columns: int, blocks: int) -> None:
    assert resident_blocks(TARGETS[target], threads, registers, shared, columns) == blocks


def test_a_block_has_threads() -> None:
    with pytest.raises(ValueError, match="threads: 0"):
        resident_blocks(TARGETS["sm_90"], 0, 32, 0)


# ---- listings --------------------------------------------------------------------------------------------------------

LISTING = """
	code for sm_90
		Function : _first
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;              /* 0x0000000402048981 */
        /*0020*/               @P1 LDG.E.U8.CONSTANT R4, desc[UR4][R2.64] ;      /* 0x0000000402048981 */
        /*0030*/                   LDG.E.S8 R4, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0060*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0090*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0 ;
        /*00a0*/                   STL [R1], R4 ;
        /*00b0*/                   LDL.LU R4, [R1] ;
        /*00c0*/             @UP0  UTMALDG.2D [UR8], [UR4] ;
        /*00d0*/                   LDS.128 R4, [R2] ;
        /*00e0*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*00f0*/                   ATOMS.ADD R4, [R2], R5 ;
        /*10000*/                  EXIT ;
		Function : second
        /*0000*/                   EXIT ;
"""


def test_instructions_are_told_apart() -> None:
    (first, listing), (second, rest) = functions(LISTING)
    assert (first, second) == ("_first", "second")
    found = counts(listing)
    assert (found.mma, found.wgmma, found.tcgen05) == (1, 1, 1)
    assert (found.loads_16B, found.loads_narrow, found.loads_bulk) == (2, 2, 1)
    assert (found.spills, found.atomics, found.instructions) == (2, 1, 17)
    assert counts(rest).instructions == 1


def test_an_empty_listing_is_not_a_clean_one() -> None:
    for read in (counts, usages):
        with pytest.raises(ValueError, match="in the listing"):
            read("Fatbin elf code:\n")


def test_resources_by_function() -> None:
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function _first:
  REG:96 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:612 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function second:
  REG:12 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:612 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert usages(text) == {"_first": Usage(96, 8, 1024, 16), "second": Usage(12, 0, 0, 0)}


# ---- rows and the gate's rules ---------------------------------------------------------------------------------------

SHAPE = Shape("clips", lambda dtype, device: {}, 4_800_000, 9_600_000, forward_flops=989_500_000_000, backward_flops=0)


def good_row(**changes: Any) -> dict[str, Any]:
    job = Job("attention", "clips", "sm_90", "", "", 0, "key", False, "forward", "warps=4", shipped=True, reads_bytes=True)
    facts = {
        "registers": 168,
        "stack": 0,
        "local": 0,
        "spills": 0,
        "shared_memory": 50_000,
        "resident_blocks": 3,
        "products": 2,
    }
    facts |= {"mma": 0, "wgmma": 12, "tcgen05": 0, "loads_16B": 8, "loads_narrow": 0}
    return make_row(job, SHAPE, facts) | changes


def test_a_row_has_its_passs_bytes_and_times() -> None:
    forward = good_row()
    assert (forward["bytes"], forward["flops"]) == (4_800_000, 989_500_000_000)
    # 1 us of bytes, 1000 us of products on an H200; B200 and A100: products bind as well.
    assert forward["h200_us"] == 1000.0 and forward["h100_us"] == 1000.0
    assert forward["b200_us"] == pytest.approx(989_500 / 2250, abs=0.01)
    assert forward["a100_us"] == pytest.approx(989_500 / 312, abs=0.01)
    job = Job("attention", "clips", "sm_90", "", "", 0, "key", True, "backward", "warps=4", True, False)
    backward = make_row(job, SHAPE, {})
    assert (backward["pass"], backward["bytes"], backward["flops"], backward["h200_us"]) == ("backward", 9_600_000, 0, 2.0)


def test_a_good_row_is_no_violation() -> None:
    assert violations([good_row()]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 1}, "spills: 1 instructions"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 4}, "4 of local memory"),
        ({"shared_memory": 232_449}, "shared memory: 232449 bytes of at most 232448"),
        ({"target": "sm_80", "mma": 4, "shared_memory": 166_913}, "shared memory: 166913 bytes of at most 166912"),
        ({"wgmma": 0}, "tensor cores: none in 2 products"),
        ({"loads_narrow": 1}, "narrow loads: 1 of one byte"),
        ({"resident_blocks": 0}, "occupancy: not one block"),
        ({"products": 0}, "attention forward sm_90 clips: no launch has a matrix product"),
    ],
)
def test_each_violation_is_named(change: dict[str, Any], said: str) -> None:
    (line,) = violations([good_row(**change)])
    assert said in line and line.startswith("attention forward sm_")


def test_a_kernel_that_does_not_compile_is_a_violation_and_is_shown() -> None:
    found = {**good_row(), "error": "CompilationError: no"}
    for field in ("registers", "spills", "shared_memory", "products"):
        del found[field]
    lines = violations([found])
    assert any("does not compile: CompilationError: no" in line for line in lines)
    assert "CompilationError: no" in show([found])


def test_boolean_masks_are_no_pixels() -> None:
    assert violations([good_row(reads_bytes=False, loads_narrow=3)]) == []


@pytest.mark.parametrize(
    ("kernels", "targets", "said"),
    [
        (["gelu"], ["sm_90"], "'gelu' is not a kernel; there are bias_gelu"),
        (["bias_gelu"], ["sm_75"], "'sm_75' is not a target"),
    ],
)
def test_what_is_not_there_is_named(kernels: list[str], targets: list[str], said: str) -> None:
    with pytest.raises(CertificateError, match=said):
        certify(kernels, targets)


def test_without_triton_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CertificateError, match=r"pip install 'vatt-engine\[triton\]'"):
        certify(["bias_gelu"])


def test_the_plan_holds_every_launch_under_every_tuning() -> None:
    from vatt.kernels.gpu.add_layer_norm import BACKWARD, FORWARD

    shape = row("add_layer_norm").shapes[0].name
    jobs = plan("add_layer_norm", "sm_80", [shape], shipped_only=False)
    # The third adds up the second one's partial sums: found to be backward by the wrapper that launched it.
    assert [job.backward for job in jobs if job.shipped] == [False, True, True]
    for launch, tables in (("forward", FORWARD), ("backward", BACKWARD)):
        tunings = [job.tuning for job in jobs if job.launch == launch]
        # Tunings that differ in the grid's programs alone are one binary, compiled once.
        binaries = {str(replace(tuning, programs=0)) for tuning in tables[1024].candidates.values()}
        assert sorted(tuning.partition(",programs")[0] for tuning in tunings) == sorted(binaries)
        (shipped,) = (job.tuning for job in jobs if job.launch == launch and job.shipped)
        assert shipped == str(tables[1024].candidates[tables[1024].default["sm_80"]])
    assert len({job.key for job in jobs}) == len(jobs)
    assert [job for job in jobs if job.shipped] == plan("add_layer_norm", "sm_80", [shape], shipped_only=True)


def test_only_integers_of_a_byte_are_pixels() -> None:
    from vatt.kernels.gpu.compiled import reads_bytes
    from vatt.kernels.gpu.launch import Launch

    for dtype, pixels in ((torch.uint8, True), (torch.int8, True), (torch.bool, False), (torch.bfloat16, False)):
        assert reads_bytes(Launch(None, (1,), {"p_x": torch.empty(4, dtype=dtype), "N": 3})) is pixels
    assert not reads_bytes(Launch(None, (1,), {"p_x": torch.empty(4).to(torch.float8_e5m2)}))


# ---- kernels made to be bad ------------------------------------------------------------------------------------------

BAD = """
import json, sys
from dataclasses import asdict
import torch, triton, triton.language as tl
from vatt.kernels.gpu.compiled import compile_launch, reads_bytes
from vatt.kernels.gpu.launch import Launch, Tuning
from vatt.kernels.gpu.target import TARGETS

@triton.jit
def strided_bytes(p_x, p_y, stride, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o * stride).to(tl.float32))

@triton.jit
def product(p_x, p_y, PRECISION: tl.constexpr, M: tl.constexpr):
    o = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
    x = tl.load(p_x + o)
    tl.store(p_y + o, tl.dot(x, x, input_precision=PRECISION))

def facts(kernel, arguments, constants, tuning=Tuning({}), target="sm_80"):
    launch = Launch(kernel, (1,), arguments, constants, tuning)
    found = compile_launch(launch, TARGETS[target])
    return asdict(found) | {"reads_bytes": reads_bytes(launch)}

meta = torch.device("meta")
pixels = torch.empty(99999, dtype=torch.uint8, device=meta)
x, y = (torch.empty(256 * 256, device=meta) for _ in range(2))
half = torch.empty(256 * 256, dtype=torch.bfloat16, device=meta)
print(json.dumps({
    "narrow": facts(strided_bytes, {"p_x": pixels, "p_y": y, "stride": 3}, {"BLOCK": 256}),
    "wide": facts(strided_bytes, {"p_x": pixels, "p_y": y, "stride": 1}, {"BLOCK": 2048}),
    "no_tensor_cores": facts(product, {"p_x": x, "p_y": y}, {"PRECISION": "ieee", "M": 32}),
    "spilling": facts(product, {"p_x": half, "p_y": y}, {"PRECISION": "tf32", "M": 128}, Tuning({}, warps=1, stages=1)),
    **{f"good_{target}": facts(product, {"p_x": half, "p_y": y}, {"PRECISION": "tf32", "M": 64}, target=target)
       for target in TARGETS},
}))
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bad") / "bad.py"
    path.write_text(BAD)
    found: dict[str, Any] = json.loads(in_compiler(path).splitlines()[-1])
    return found


def in_compiler(path: Path, *arguments: str, triton: Path | None = None) -> str:
    """Output of a script in a process whose Triton compiles; `triton`: the folder of another release than the pinned one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(triton or ""), environment.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_loads_of_one_byte_are_seen(bad: dict[str, Any]) -> None:
    assert bad["narrow"]["counts"]["loads_narrow"] > 0 and bad["narrow"]["reads_bytes"]
    assert bad["wide"]["counts"]["loads_narrow"] == 0 and bad["wide"]["counts"]["loads_16B"] > 0


def test_products_without_tensor_cores_are_seen(bad: dict[str, Any]) -> None:
    found = bad["no_tensor_cores"]
    assert found["products"] == 1 and not any(found["counts"][name] for name in ("mma", "wgmma", "tcgen05"))


def test_spills_are_seen(bad: dict[str, Any]) -> None:
    assert bad["spilling"]["counts"]["spills"] > 0 and bad["spilling"]["usage"]["stack"] > 0


def test_each_target_has_its_own_tensor_core_instruction(bad: dict[str, Any]) -> None:
    for target, name in (("sm_80", "mma"), ("sm_90", "wgmma"), ("sm_100", "tcgen05")):
        found = bad[f"good_{target}"]
        assert found["products"] == 1
        assert [key for key in ("mma", "wgmma", "tcgen05") if found["counts"][key]] == [name], target
    assert bad["good_sm_100"]["tensor_columns"] > 0


# ---- CUDA C++ --------------------------------------------------------------------------------------------------------


def test_a_skipped_row_says_why_and_is_no_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    from vatt.kernels import native

    def missing() -> str:
        raise native.NotBuilt("nvcc was not found; install it")

    pytest.importorskip("triton", reason="reads binaries with Triton's tools")
    monkeypatch.setattr(native, "nvcc", missing)
    assert certificate_cuda.compile_cuda("read_patches", "sm_90") == {"skipped": "nvcc was not found; install it"}
    found = good_row(kernel="read_patches")
    del found["registers"], found["products"]
    found["skipped"] = "nvcc was not found; install it"
    assert violations([found]) == [] and "nvcc was not found" in show([found])


def test_what_is_written_down_about_cuda_kernels_is_so() -> None:
    from vatt.kernels.native import folder

    kernel = certificate_cuda.KERNELS["read_patches"]
    source = (folder() / "cuda" / kernel.source).read_text()
    assert f"{kernel.launch}<In, Out><<<blocks, {kernel.threads}, 0," in source
    # 64 clips, 784 patches of 4 x 16 x 16 x 3 pixels: a byte read, two written; and an index of 8 bytes for each patch.
    assert kernel.shapes[0].forward_bytes == 64 * 784 * (3072 * 3 + 8)


# ---- the gate --------------------------------------------------------------------------------------------------------

GATE = """
import json, sys
from vatt.benchmarks.certificate import certify, violations

if __name__ == "__main__":
    what, targets, out = sys.argv[1:]
    version, rows = certify(targets=targets.split(","), shipped_only=what != "whole", first_shape_only=what == "sample")
    open(out, "w").write(json.dumps({"version": version, "rows": rows, "violations": violations(rows)}))
"""


def gate(tmp_path: Path, what: str, release: str, targets: str) -> None:
    if release == "3.6.0" and not (OLDEST / "triton").is_dir():
        pytest.fail(f"{OLDEST.relative_to(ROOT)} is missing; `make {OLDEST.relative_to(ROOT)}/.ready` installs that Triton")
    (tmp_path / "gate.py").write_text(GATE)
    in_compiler(tmp_path / "gate.py", what, targets, str(tmp_path / "rows.json"), triton=OLDEST if release == "3.6.0" else None)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert (found["version"] == "3.6.0") == (release == "3.6.0"), found["version"]
    assert {row["kernel"] for row in found["rows"]} == set(EVERY)
    assert {row["target"] for row in found["rows"]} == set(targets.split(","))
    assert not found["violations"], "\n".join(found["violations"])


@pytest.mark.parametrize(("release", "targets"), [("pinned", "sm_80,sm_90,sm_100"), ("3.6.0", "sm_90")])
def test_what_ships_compiles_well(release: str, targets: str, tmp_path: Path) -> None:
    """One shape a kernel, the tunings that each target uses."""
    gate(tmp_path, "sample", release, targets)


@pytest.mark.slow
@pytest.mark.parametrize(("release", "what"), [("pinned", "whole"), ("3.6.0", "shipped")])
def test_every_shape_and_tuning_compiles_well(release: str, what: str, tmp_path: Path) -> None:
    """Every shape; of the tunings, all that a target is offered, or with the oldest Triton those it uses."""
    gate(tmp_path, what, release, ",".join(TARGETS))
