"""Compiled networks are kept, found again, and never run where anything about them is wrong; images come out anyway."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch
from torch import Tensor, nn

from fastddpm import Sampler, Schedule, UNet, UNetConfig, ddpm_table
from fastddpm.cli import main
from fastddpm.errors import BackendUnavailable
from fastddpm.machine import building, packages
from fastddpm.machine.building import Want
from fastddpm.sampling import options
from fastddpm.sampling.kept import KeptNetwork
from fastddpm.sampling.network import sampling_networks
from fastddpm.unet.inference import UNetForms

SHAPE = (3, 8, 8)
SEEDS = [1, 2]
CONFIG = {
    "sample_size": 8,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 2,
    "add_attention": False,
    "attention_head_dim": None,
}


def unet(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(UNetConfig(**CONFIG), zero_init=False).eval()  # type: ignore[arg-type]


def sampler(model: UNet | None = None, **given: Any) -> Sampler:
    return Sampler(model or unet(), ddpm_table(Schedule.linear_rescaled(50), steps=3), SHAPE, **given)


def uncompiled() -> Tensor:
    return sampler(compile=False).sample(seeds=SEEDS)


def agrees(images: Tensor) -> bool:
    """Within rounding, and not by running uncompiled."""
    expected = uncompiled()
    return bool((images - expected).norm() < 1e-5 * expected.norm()) and not torch.equal(images, expected)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package that a process built which is gone."""
    out = tmp_path_factory.mktemp("built") / "model.pt2"
    code = f"""
import sys, torch
from pathlib import Path
from tests.machine.test_packages import SHAPE, unet
from fastddpm.machine.building import Want
from fastddpm.unet.inference import UNetForms
forms = UNetForms(unet(), torch.arange(1), want=Want.NEVER, strict=True)
forms.build(torch.zeros(2, *SHAPE).contiguous(memory_format=torch.channels_last), Path({str(out)!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    return out


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("FASTDDPM_CACHE_DIR", str(folder))
    monkeypatch.setattr(building, "_background", {})
    monkeypatch.setattr(building, "_failed", set())
    yield folder
    for build in building._background.values():
        build._process.kill()


@pytest.fixture
def kept(cache: Path, built: Path) -> Path:
    """The package, in the cache."""
    path = packages.path_of(packages.identity_of(built))
    packages.store(path, built.read_bytes())
    return path


@pytest.fixture
def eager_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """compile="auto" builds in the background whatever the work."""
    monkeypatch.setattr(options, "BACKGROUND_AFTER", 0)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been built."""
    asked: list[str] = []

    class Build:
        _process = SimpleNamespace(kill=lambda: None)

        def __init__(self, identity: dict[str, str], job: Any, **rest: Any) -> None:
            asked.append(identity["shape"])

        def runs(self) -> bool:
            return True

    monkeypatch.setattr(building, "_Build", Build)
    return asked


@pytest.mark.slow
def test_package_is_found_by_another_process_without_a_compiler(kept: Path) -> None:
    code = """
import sys, torch
from tests.machine.test_packages import agrees, sampler, SEEDS
assert agrees(sampler(compile=True).sample(seeds=SEEDS))
print("torch._dynamo" in sys.modules, "torch._inductor" in sys.modules)
"""
    environment = {**os.environ, "PATH": "", "CXX": ""}
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert found.stdout == "False False\n", found.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("eager_to_compile")
def test_package_is_used_from_the_next_call_on_and_never_within_a_run(
    cache: Path, built: Path, builds: list[str]
) -> None:
    one, path = sampler(), packages.path_of(packages.identity_of(built))
    steps = one.steps(seeds=SEEDS)
    next(steps)
    assert builds == ["2x3x8x8"]
    settled = sampler()
    assert not settled.settle(seeds=SEEDS)
    packages.store(path, built.read_bytes())
    *_, last = steps
    assert torch.equal(last.x_t, uncompiled())
    assert agrees(one.sample(seeds=SEEDS))
    assert torch.equal(settled.sample(seeds=SEEDS), uncompiled())
    assert sampler().settle(seeds=SEEDS)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_to_compile")
def test_package_with_a_flipped_byte_is_not_run(kept: Path, builds: list[str]) -> None:
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    assert torch.equal(sampler().sample(seeds=SEEDS), uncompiled())
    assert builds == ["2x3x8x8"]


@pytest.mark.slow
@pytest.mark.usefixtures("eager_to_compile")
def test_package_for_another_processor_is_not_run(
    kept: Path, built: Path, builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "instruction_set", lambda: "s390x vector")
    assert torch.equal(sampler().sample(seeds=SEEDS), uncompiled())
    # Not even from the place where that processor's would be.
    identity = packages.identity_of(built) | {"processor": "s390x vector"}
    packages.store(packages.path_of(identity), built.read_bytes())
    assert torch.equal(sampler().sample(seeds=SEEDS), uncompiled())
    assert builds == ["2x3x8x8"]
    with pytest.raises(BackendUnavailable, match=r"compiled for processor .* instead of s390x vector"):
        sampler(compiled=built).sample(seeds=SEEDS)


@pytest.mark.slow
def test_named_file_runs_and_is_checked(cache: Path, built: Path, tmp_path: Path) -> None:
    assert agrees(sampler(compiled=built).sample(seeds=SEEDS))
    with pytest.raises(BackendUnavailable, match="compiled for weights"):
        sampler(unet(1), compiled=built).sample(seeds=SEEDS)
    with pytest.raises(BackendUnavailable, match="shape 2x3x8x8 instead of 3x3x8x8"):
        sampler(compiled=built).sample(seeds=[1, 2, 3])
    other = tmp_path / "other.pt2"
    other.write_bytes(b"PK")
    with pytest.raises(BackendUnavailable, match=r"none\.pt2 cannot be read: No such file"):
        sampler(compiled=tmp_path / "none.pt2").sample(seeds=SEEDS)
    with pytest.raises(BackendUnavailable, match="no package of this library"):
        sampler(compiled=other).sample(seeds=SEEDS)
    with pytest.raises(BackendUnavailable, match="is for a module on a CPU, not for function"):
        Sampler(lambda x, t: x, ddpm_table(Schedule.linear(50)), SHAPE, compiled=built).sample(seeds=SEEDS)


@pytest.mark.slow
def test_cache_that_others_can_write_is_not_used(kept: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path, mode in ((kept.parent, 0o777), (kept, 0o666)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert packages.find(packages.identity_of(kept)) is None
        path.chmod(before)
    assert f"others can write to {kept.parent}: set FASTDDPM_CACHE_DIR" in caplog.text
    assert packages.find(packages.identity_of(kept)) is not None


@pytest.mark.slow
@pytest.mark.usefixtures("eager_to_compile")
def test_cache_that_cannot_be_written_is_read(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access, folder = os.access, str(kept.parent)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != folder and access(path, mode))
    assert agrees(sampler(compile=True).sample(seeds=SEEDS))
    packages.remove(kept)
    assert torch.equal(sampler().sample(seeds=SEEDS), uncompiled())
    with pytest.raises(BackendUnavailable, match="set FASTDDPM_CACHE_DIR to a folder that can be written"):
        sampler(compile=True).sample(seeds=SEEDS)


@pytest.mark.usefixtures("cache", "eager_to_compile")
def test_without_a_compiler_images_are_drawn_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "has_cpp_compiler", lambda: False)
    assert torch.equal(sampler().sample(seeds=SEEDS), uncompiled())
    with pytest.raises(BackendUnavailable, match="no C\\+\\+ compiler was found"):
        sampler(compile=True).sample(seeds=SEEDS)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_to_compile")
def test_killed_build_leaves_nothing_that_is_used(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = sampler()
    assert torch.equal(one.sample(seeds=SEEDS), uncompiled())
    ((path, build),) = building._background.items()
    while not path.with_suffix(packages.WORK).exists():
        assert build._process.poll() is None
        time.sleep(0.1)
    with pytest.raises(filelock.Timeout):
        filelock.FileLock(path.with_suffix(packages.LOCK)).acquire(timeout=0)
    build._process.send_signal(signal.SIGKILL)
    build._process.wait()
    assert not path.exists()
    for _ in range(2):
        assert torch.equal(one.sample(seeds=SEEDS), uncompiled())
    assert caplog.text.count("the process that builds it ended with status -9") == 1
    with filelock.FileLock(path.with_suffix(packages.LOCK)).acquire(timeout=0):
        pass


@pytest.mark.slow
def test_weights_of_a_package_do_not_lie_in_memory_twice(built: Path) -> None:
    if platform.system() != "Linux":
        pytest.skip("where memory lies is read from Linux")
    code = packages.load(built, packages.identity_of(built))
    library = r"r--p .*\.wrapper\.so\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+) kB\n"
    found = re.findall(library, Path("/proc/self/smaps").read_text())
    size, resident = max((int(size), int(resident)) for size, resident in found)
    assert size > 500, found
    assert resident < size / 4, found
    del code  # until here the library is mapped


@pytest.mark.slow
def test_two_builders_build_once(kept: Path) -> None:
    identity, job = packages.identity_of(kept), (nn.Identity(), (torch.zeros(1),))
    before = kept.stat().st_ino
    with filelock.FileLock(kept.with_suffix(packages.LOCK)):
        # Building what does not run would fail.
        assert building._Build(identity, job, out=None, waits=False).wait() is None
        second = building._Build(identity, job, out=None, waits=True)
    assert second.wait() is None
    assert kept.stat().st_ino == before


def test_package_is_its_owners_alone_whatever_the_umask(cache: Path) -> None:
    before = os.umask(0)
    try:
        packages.store(cache / "a.pt2", b"code")
    finally:
        os.umask(before)
    assert packages.is_whole(cache / "a.pt2")


def test_oldest_packages_make_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_BYTES", 20)
    paths = [cache / f"{name * 32}.pt2" for name in "abcd"]
    for age, path in zip((0, 30, 20, 10), paths, strict=True):
        packages.store(path, bytes(9))
        os.utime(path, (time.time() - age, time.time() - age))
    assert packages.stored() == [paths[3], paths[0]]
    packages.store(paths[1], bytes(99))
    assert packages.stored() == [paths[1]]


def test_failing_build_says_why(cache: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"cannot be compiled: .*reduction dim"):
        building.build({"threads": "1"}, lambda: (nn.Linear(2, 2), (torch.zeros(1, 3),)))


def _circular(model: UNet) -> None:
    model.conv_in.padding_mode = "circular"


def _other_eps(model: UNet) -> None:
    model.conv_norm_out.eps = 0.1


def _other_activation(model: UNet) -> None:
    model.mid_block.resnets[0].act = torch.relu


@pytest.mark.parametrize("change", [_circular, _other_eps, _other_activation])
def test_package_is_not_for_a_network_that_differs_in_more_than_weights(
    change: Callable[[UNet], None], builds: list[str]
) -> None:
    changed = unet()
    change(changed)
    before = torch.get_rng_state()
    images = sampler(changed).sample(seeds=SEEDS)
    assert torch.equal(torch.get_rng_state(), before)
    networks = sampling_networks(changed, torch.arange(3), want=Want.FOR_LATER, strict=False)
    assert isinstance(networks(2), KeptNetwork)
    assert not torch.equal(images, uncompiled())
    assert builds == []


def test_package_is_not_built_from_weights_changed_after_they_were_hashed() -> None:
    model, x = unet(), torch.zeros(2, *SHAPE)
    forms = UNetForms(model, torch.arange(1), want=Want.NEVER, strict=True)
    forms._identity(x)
    forms.job(x)
    model.conv_out.weight.data.add_(1)
    with pytest.raises(BackendUnavailable, match=r"weights were changed"):
        forms.job(x)


@pytest.mark.usefixtures("cache", "eager_to_compile")
def test_network_that_cannot_be_pickled_runs_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    model = unet()
    model.mid_block.register_full_backward_hook(lambda *_: None)
    assert torch.equal(sampler(model).sample(seeds=SEEDS), uncompiled())
    assert "cannot be started" in caplog.text
    with pytest.raises(BackendUnavailable, match=r"pickle"):
        sampler(model, compile=True).settle(seeds=SEEDS)


@pytest.mark.usefixtures("cache", "eager_to_compile")
def test_path_that_is_no_text_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    assert torch.equal(sampler().sample(seeds=SEEDS), uncompiled())
    assert len(building._background) == 1


def test_clearing_leaves_what_the_library_has_not_written_and_builds_that_run(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages.store(cache / f"{'a' * 32}.pt2", b"code")
    left = [cache / name for name in (f"{'b' * 32}.build", f".{'b' * 32}.pt2.7.tmp", f".{'c' * 32}.sha256.8.tmp")]
    others = [cache / name for name in ("app.build", "model.pt2", ".model.pt2.7.tmp")]
    for path in left[1:] + others:
        path.touch()
    left[0].mkdir()
    with packages.locked(cache / f"{'b' * 32}.pt2", 0):
        assert main(["cache", "clear"]) == 0
        assert "1 compiled networks, 0.0 MiB, removed\n1 more" in capsys.readouterr().out
        assert [path.exists() for path in left] == [True, True, False]
    assert packages.clear() == 0
    assert {path for path in cache.iterdir() if path.suffix != packages.LOCK} == set(others)


def test_build_of_another_process_is_awaited_aloud_until_it_dies(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = cache / f"{'a' * 32}.pt2"
    code = f"""
import os, pathlib, time
from fastddpm.machine import packages
path = pathlib.Path({str(path)!r})
with packages.locked(path, 0):
    path.with_suffix(packages.WORK).mkdir()
    (path.with_suffix(packages.WORK) / packages.PID).write_text(str(os.getpid()))
    print("ready", flush=True)
    time.sleep(600)
"""
    root = Path(__file__).parents[2]
    with (
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE) as other,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(building, "SAYS_AFTER", 0.01)
        patch.setattr(building, "SAYS_EVERY", 0.01)
        assert other.stdout is not None
        other.stdout.readline()
        waits = threading.Thread(target=building._await_others, args=(path,))
        waits.start()
        while caplog.text.count(f"waiting for process {other.pid}, which compiles the same network") < 2:
            assert waits.is_alive()
            time.sleep(0.01)
        other.kill()
        waits.join()


def test_interrupted_build_leaves_nothing_behind(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.pt2"
    build = building._Build({"threads": "1"}, (nn.Identity(), (torch.zeros(1),)), out=out, waits=True)
    temporary = out.with_name(f".model.pt2.{build._process.pid}.tmp")
    temporary.touch()
    (cache / f"{'a' * 32}.build").mkdir()
    wait = build._process.wait

    def interrupted(timeout: float | None = None) -> int:
        if timeout is not None:
            raise KeyboardInterrupt
        return wait()

    monkeypatch.setattr(build._process, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build.wait()
    assert not build.runs()
    assert not temporary.exists()
    assert not list(cache.glob("*.build"))


@pytest.mark.usefixtures("cache")
def test_background_builds_that_ended_are_forgotten_but_for_their_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[str] = []

    class Build:
        _process = SimpleNamespace(kill=lambda: None)

        def __init__(self, identity: dict[str, str], job: Any, **_: Any) -> None:
            started.append(identity["weights"])

        def runs(self) -> bool:
            return False

        def failure(self) -> str | None:
            return "no space" if started[-1] == "2" else None

    monkeypatch.setattr(building, "_Build", Build)
    for weights in ("1", "1", "2", "2", "3", "2", "4"):
        building._build_in_background({"weights": weights}, lambda: (nn.Identity(), ()))
        assert len(building._background) <= 1
    # What was built may have been cleared since; what cannot be built is not tried again.
    assert started == ["1", "1", "2", "3", "4"]
    assert caplog.text.count("runs uncompiled: no space") == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.usefixtures("cache")
def test_forked_child_builds_though_a_thread_of_its_parent_held_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(building._background, Path("a"), SimpleNamespace(_process=SimpleNamespace(kill=lambda: None)))
    with building._guard:
        child = os.fork()
        if child == 0:
            os._exit(int(not building._guard.acquire(timeout=0) or bool(building._background)))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.usefixtures("cache", "eager_to_compile", "builds")
def test_decision_for_a_samplers_life_outlives_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unet()
    settled, found = sampler(model), sampler(model)
    assert not settled.settle(seeds=SEEDS)
    monkeypatch.setattr(packages, "find", lambda identity: lambda x, time: torch.zeros_like(x))
    assert found.settle(seeds=SEEDS)
    settled.refresh()
    assert torch.equal(settled.sample(seeds=SEEDS), uncompiled())
    # What was found may be found again, and is not waited for.
    found.refresh()
    assert not torch.equal(found.sample(seeds=SEEDS), uncompiled())
    monkeypatch.setattr(packages, "find", lambda identity: None)
    model.conv_in.bias.data.add_(1)
    expected = sampler(model, compile=False).sample(seeds=SEEDS)
    assert torch.equal(found.sample(seeds=SEEDS), expected)


def test_compiled_code_is_not_run_where_it_was_refused() -> None:
    with pytest.raises(ValueError, match=r"compile=False and compiled='model.pt2' contradict each other"):
        sampler(compile=False, compiled="model.pt2")


@pytest.mark.slow
def test_package_is_loaded_by_torchs_own_wrapper_where_the_loader_is_another(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = torch._C._aoti.AOTIModelPackageLoader
    calls: list[tuple[Any, ...]] = []

    def other(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise TypeError("incompatible constructor arguments")
        return loader(*arguments)

    for name, value in vars(loader).items():
        if isinstance(value, staticmethod):
            setattr(other, name, getattr(loader, name))
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", other)
    assert agrees(sampler(compiled=built).sample(seeds=SEEDS))
    assert len(calls) == 2


def test_code_for_a_cpu_is_not_run_on_another_device() -> None:
    forms = UNetForms(unet(), torch.arange(1), want=Want.NEVER, strict=True, file=Path("model.pt2"))
    with pytest.raises(BackendUnavailable, match=r"code for a CPU"):
        forms.choose(torch.zeros(2, *SHAPE, device="meta"))
