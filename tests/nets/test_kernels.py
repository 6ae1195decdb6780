"""The compiled operators against their twins in plain PyTorch, and how they are built."""

from __future__ import annotations

import os
import random
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import loop_over
from forked import started_script
from fuzzing import bounded, campaign, damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from irregular import IRREGULAR, put_in_place
from torch import Tensor

from metamom.common.files import cache_folder
from metamom.nets import kernels
from metamom.nets.kernels import build, reference
from metamom.nets.kernels.build import CompilerError, load

CPU = torch.device("cpu")
EPS = 1e-5
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
ARGUMENTS = {
    "norm_relu": ("y", "gain", "shift"),
    "norm_relu_backward": ("dz", "y", "gain", "z", "mean", "rstd"),
    "norm_relu_double_backward": ("v", "a", "s", "dz", "y", "gain", "z", "mean", "rstd"),
}
of_norm = pytest.mark.parametrize("name", ARGUMENTS)


def compiled(name: str, *args: object) -> tuple[Tensor, ...]:
    with kernels.native(CPU):
        out = getattr(kernels, name)(*args)
    return out if isinstance(out, tuple) else (out,)


def plain(name: str, *args: object) -> tuple[Tensor, ...]:
    out = getattr(reference, name)(*args)
    return out if isinstance(out, tuple) else (out,)


def assert_near(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    """Equal to ``tolerance`` times the norm: cancellation leaves single entries with no digits to compare."""
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, f"result {i}: {tuple(a.shape)} != {tuple(b.shape)}"
        error, scale = float((a.double() - b.double()).norm()), float(b.double().norm())
        assert error <= tolerance * (1 + scale), f"result {i} differs by {error}, at a norm of {scale}"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def values(G: int, M: int, C: int, dtype: torch.dtype, offset: float = 0.0) -> dict[str, Tensor]:
    """An argument for every name in `ARGUMENTS`; z, mean and rstd are those of ``y``, as the layers pass them."""
    full = {name: draw(G, M, C, seed=i, dtype=dtype) for i, name in enumerate(("y", "dz", "v"))}
    rows = {name: draw(G, C, seed=10 + i, dtype=dtype) for i, name in enumerate(("gain", "shift", "a", "s"))}
    full["y"] = full["y"] + offset
    saved = reference.norm_relu(full["y"], rows["gain"], rows["shift"], EPS)
    return full | rows | dict(zip(("z", "mean", "rstd"), saved, strict=True))


def arguments(name: str, given: dict[str, Tensor]) -> list[object]:
    return [given[key] for key in ARGUMENTS[name]] + ([EPS] if name == "norm_relu" else [])


each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


@each_dtype
@given(
    B=st.integers(1, 4),
    H=st.sampled_from([1, 2, 3, 4, 7, 14, 28]),
    W=st.sampled_from([1, 2, 3, 4, 7, 14, 28]),
    C=st.sampled_from([1, 2, 3, 17, 64]),
)
@settings(deadline=None, max_examples=60)
def test_unfold_and_fold_agree_with_plain_pytorch(dtype, B, H, W, C):
    images, patches = draw(B, H, W, C, dtype=dtype), draw(B, (H + 1) // 2, (W + 1) // 2, 9 * C, seed=1, dtype=dtype)
    assert torch.equal(*compiled("unfold", images), *plain("unfold", images))
    assert_near(compiled("fold", patches, H, W), plain("fold", patches, H, W), TOLERANCE[dtype])


SIZES = {
    "G": st.integers(1, 4),
    "M": st.sampled_from([1, 2, 31, 32, 33, 64, 65, 245]),
    "C": st.sampled_from([1, 2, 3, 63, 64, 65, 128, 130]),
}


@each_dtype
@of_norm
@given(**SIZES)
@settings(deadline=None, max_examples=40)
def test_norm_relu_and_its_derivatives_agree_with_plain_pytorch(name, dtype, G, M, C):
    args = arguments(name, values(G, M, C, dtype))
    # One position has no variance, so rstd is 316; two normalise to -1 and 1, and the derivatives cancel to nothing.
    tolerance = TOLERANCE[dtype] * (1 if M > 2 else 1e3)
    assert_near(compiled(name, *args), plain(name, *args), tolerance)


@of_norm
@given(**SIZES)
@settings(deadline=None, max_examples=20)
def test_arguments_need_not_be_contiguous(name, G, M, C):
    """Any layout gives the contiguous one's result, to the last bit."""
    args = arguments(name, values(G, M, C, torch.float64))
    strided = [a.mT.contiguous().mT if isinstance(a, Tensor) and a.dim() == 3 else a for a in args]
    gapped = [torch.stack([a, a], -1)[..., 0] if isinstance(a, Tensor) else a for a in args]
    expected = compiled(name, *args)
    for other in (strided, gapped):
        for a, b in zip(compiled(name, *other), expected, strict=True):
            assert torch.equal(a, b)


def test_images_need_not_be_contiguous():
    images, patches = draw(2, 3, 7, 6).movedim(1, -1), draw(27, 2, 4, 3).movedim(0, -1)
    assert not images.is_contiguous()
    assert not patches.is_contiguous()
    assert torch.equal(*compiled("unfold", images), *plain("unfold", images))
    assert_near(compiled("fold", patches, 7, 6), plain("fold", patches.contiguous(), 7, 6), 1e-12)


@of_norm
def test_gains_and_shifts_may_be_expanded(name):
    """Before the first inner step all tasks have the same: one row in memory, of stride 0."""
    given = values(5, 33, 65, torch.float64)
    for key in ("gain", "shift", "a", "s"):
        given[key] = given[key][:1].expand(5, -1)
    given |= dict(zip(("z", "mean", "rstd"), plain("norm_relu", *arguments("norm_relu", given)), strict=True))
    args = arguments(name, given)
    assert_near(compiled(name, *args), plain(name, *args), 1e-12)


@of_norm
def test_arguments_are_left_as_they_are(name):
    args = arguments(name, values(2, 33, 65, torch.float64))
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    compiled(name, *args)
    for a, b in zip(args, before, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("M", [33, 245, 4000])
@of_norm
def test_a_large_mean_costs_no_more_than_the_rounding_of_the_input(name, M):
    """Mean 1e4 and deviation 1 in float32: the sum of squares less the squared mean would have no digit left."""
    narrow = values(2, M, 65, torch.float32, offset=1e4)
    wide = {key: value.double() for key, value in narrow.items()}
    exact = plain("norm_relu", *arguments("norm_relu", wide))
    if name != "norm_relu":  # the saved tensors are exact ones here, and both see the same
        for key, value in zip(("z", "mean", "rstd"), exact, strict=True):
            narrow[key], wide[key] = value.float(), value.float().double()
    # a mean of 1e4 in float32 is off by up to 5e-4, and with it x
    assert_near(compiled(name, *arguments(name, narrow)), plain(name, *arguments(name, wide)), 2e-3)


@of_norm
@loop_over(where=("y", "gain", "shift", "dz", "v", "a", "s"), bad=(float("nan"), float("inf"), -float("inf")))
def test_nan_and_infinity_go_where_they_go_in_plain_pytorch(name, where, bad):
    given = values(2, 33, 65, torch.float64)
    given[where].view(2, -1)[1, 3] = bad  # channel 3 of the second group
    given |= dict(zip(("z", "mean", "rstd"), plain("norm_relu", *arguments("norm_relu", given)), strict=True))
    args = arguments(name, given)
    for i, (ours, theirs) in enumerate(zip(compiled(name, *args), plain(name, *args), strict=True)):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda text, i=i: f"result {i}: {text}"
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_in_images(bad):
    images, patches = draw(2, 5, 4, 3), draw(2, 3, 2, 27)
    images[1, 2, 3, 0] = patches[1, 1, 1, 5] = bad
    for name, args in (("unfold", (images,)), ("fold", (patches, 5, 4))):
        torch.testing.assert_close(*compiled(name, *args), *plain(name, *args), equal_nan=True)


GEOMETRY = [2, 1, 1, 0, 1, 2, 1]  # stride, padding, dilation, groups
OF_IMAGES = (
    "convolve",
    "convolve_to_images",
    "convolve_to_kernels",
    "norm",
    "activate",
    "pool",
    "norm_backward",
    "norm_double_backward",
)


def of_images(name: str) -> tuple[object, ...]:
    """Arguments of an operator on images ``[G, N, H, W, C]``."""
    x, weight, bias = draw(2, 3, 7, 6, 5), draw(2, 4, 5, 3, 2), draw(2, 4)
    out = kernels.convolve(x, weight, bias, GEOMETRY)
    if name.startswith("convolve"):
        return {
            "convolve": (x, weight, bias, GEOMETRY),
            "convolve_to_images": (out, weight, GEOMETRY, 7, 6),
            "convolve_to_kernels": (x, out, GEOMETRY, 3, 2),
        }[name]
    gain, shift = draw(2, 5, seed=1), draw(2, 5, seed=2)
    z, mean, rstd = kernels.norm(x, gain, shift, EPS)
    windows = (z, 0.1, [2, 3, 2, 1, 1, 0, 1, 1], True)
    pooled, places = kernels.pool(x, gain, shift, mean, rstd, *windows)
    after = (pooled, x, gain, mean, rstd, pooled, places, 0.1)
    return {
        "norm": (x, gain, shift, EPS),
        "activate": (x, gain, shift, mean, rstd, z, 0.1),
        "pool": (x, gain, shift, mean, rstd, *windows),
        "norm_backward": after,
        "norm_double_backward": (x + 1, gain + 1, shift + 1, *after),
    }[name]


OPCHECKS = {
    "unfold": lambda: (draw(2, 5, 4, 3),),
    "fold": lambda: (draw(2, 3, 2, 27), 5, 4),
    **{name: lambda name=name: tuple(arguments(name, values(2, 33, 65, torch.float32))) for name in ARGUMENTS},
    **{name: lambda name=name: of_images(name) for name in OF_IMAGES},
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name):
    """The schema tells the truth, and so do the shapes that tracing goes by."""
    load()
    args = OPCHECKS[name]()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.metamom, name).default, args, test_utils=tests)


def test_the_plain_implementation_runs_outside_native(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(reference, "unfold", lambda images: calls.append("plain") or images)
    image = draw(1, 2, 2, 1)
    kernels.unfold(image)
    with kernels.native(CPU):
        kernels.unfold(image)
        assert len(calls) == 1
        kernels.unfold(image.half())  # of which there is no compiled one
        kernels.unfold(image.to("meta"))
    assert len(calls) == 3
    with kernels.native(torch.device("cuda")):
        kernels.unfold(image)
    with pytest.raises(ZeroDivisionError), kernels.native(CPU):
        _ = 1 / 0
    kernels.unfold(image)
    assert len(calls) == 5


LOADS = """
    import os
    os.environ.update({environment})
    import torch
    from metamom import kernels
    with kernels.native(torch.device("cpu")):
        print(tuple(kernels.unfold(torch.ones(1, 2, 2, 1)).shape))
"""


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_headers_are_torch_s_own():
    from torch.utils import cpp_extension  # whose import says on stderr that a CUDA build finds no GPU

    assert (
        [flag for flag in build._flags() if flag.startswith("-I")]
        == [  # older torch has more
            f"-I{folder}" for folder in cpp_extension.include_paths()[:2]
        ]
    )


def test_two_processes_build_once(tmp_path):
    """Both start with an empty folder; the compiler runs for one of them, the other waits and loads what it built.

    The compiler is a script that takes notes, and time, and copies what the real one built for these tests.
    """
    load()
    (built,) = cache_folder().glob("kernels-*.so")
    notes, cache = tmp_path / "notes", tmp_path / "cache"
    copy = f'while [ "$1" != -o ]; do shift; done\necho built >> {notes}\nsleep 2\ncp {built} "$2"'
    compiler = script(tmp_path / "c++", f'[ "$1" = --version ] && exit 0\n{copy}')
    loads = LOADS.format(environment={"METAMOM_CACHE": str(cache), "CXX": str(compiler)})
    with started_script(loads, tmp_path / "first") as first, started_script(loads, tmp_path / "second") as second:
        assert [process.ended() for process in (first, second)] == [(0, "(1, 1, 1, 9)\n")] * 2
    assert notes.read_text().split() == ["built"]
    assert len(list(cache.glob("*.so"))) == 1


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library(tmp_path, cache) -> Callable[[], tuple[Path, int]]:
    """The library's path, and how often it was built for that: by a script that writes the same bytes each time."""
    notes = tmp_path / "notes"
    (tmp_path / "made").write_bytes(MADE)
    compiler = script(
        tmp_path / "c++", f'while [ "$1" != -o ]; do shift; done\necho >> {notes}\ncp {tmp_path}/made "$2"'
    )

    def get() -> tuple[Path, int]:
        notes.write_text("")
        path = build._library(str(compiler), "kernels-0")
        assert path.read_bytes() == MADE
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert [*cache.glob("kernels-0-*.so")] == [path]
        return path, len(notes.read_text())

    return get


MADE = random.Random(0).randbytes(3000)


@campaign(25, 300)
def test_a_damaged_library_is_built_again(library, seeds):
    path, built = library()
    assert (path, built) == (library()[0], 1)
    assert library()[1] == 0
    for seed in seeds:
        broken = damaged(MADE, random.Random(seed))
        path.write_bytes(broken)
        assert library()[1] == (broken != MADE), f"seed {seed}"


@pytest.mark.parametrize("kind", [kind for kind in IRREGULAR if kind != "a folder"] + ["a link to a file"])
def test_something_else_in_the_place_of_the_library(library, tmp_path, kind):
    path, _ = library()
    if kind in IRREGULAR:
        put_in_place(kind, path)
    else:  # which may be changed by others
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    with bounded(20, 256):
        assert library()[1] == 1
    assert not path.is_symlink()


def test_a_library_under_a_name_that_is_not_its_own(library, cache):
    """Code that somebody else left there."""
    path, _ = library()
    path.unlink()
    (cache / "kernels-0-0123456789abcdef01234567.so").write_bytes(b"code")
    (cache / "kernels-0.so").write_bytes(b"code")
    assert library()[1] == 1


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_library_that_others_can_write_is_built_again(library, mode):
    path, _ = library()
    path.chmod(mode)
    assert library()[1] == 1


def test_a_library_of_another_user_is_built_again(library, monkeypatch):
    library()
    monkeypatch.setattr(build, "_user", lambda: os.getuid() + 1)
    assert library()[1] == 1


def test_users_who_share_a_folder_have_a_library_each(cache, monkeypatch, tmp_path):
    names = []
    monkeypatch.setattr(build, "_library", lambda _, name: names.append(name) or tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    for user in (1, 2, 1):
        monkeypatch.setattr(build, "_user", lambda user=user: user)
        load.__wrapped__()
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize(
    ("mode", "trusted"), [(0o777, False), (0o703, False), (0o1777, True), (0o770, True), (0o755, True)]
)
def test_a_folder_where_every_user_replaces_files_is_refused(library, cache, mode, trusted):
    cache.mkdir()
    cache.chmod(mode)
    if trusted:
        assert library()[1] == 1
    else:
        with pytest.raises(
            CompilerError, match=r"every user can replace files .* \(chmod o-w .*\), name another folder"
        ):
            library()


def test_a_cache_that_cannot_be_written(cache):
    cache.write_text("")
    with pytest.raises(
        CompilerError, match=r"cannot keep metamom's kernels in .*File exists.* folder in \$METAMOM_CACHE"
    ):
        load.__wrapped__()


def test_a_library_that_cannot_be_loaded(cache, tmp_path, monkeypatch):
    """As on a disk mounted without the right to execute."""
    making = 'while [ "$1" != -o ]; do shift; done\necho broken > "$2"'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", f'[ "$1" = --version ] && exit 0\n{making}')))
    with pytest.raises(CompilerError, match=r"or load them from there: .*(invalid ELF header|file too short)"):
        load.__wrapped__()


def test_there_is_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "cache"))
    remedy = r"there is no /nonexistent on the path. Install one .* name it in \$CXX, or run without compiling"
    with pytest.raises(CompilerError, match=remedy):
        load.__wrapped__()
    assert not (tmp_path / "cache").exists()
    assert issubclass(CompilerError, ValueError)


@pytest.mark.parametrize(
    ("says", "expected"),
    [("echo 'k.cpp:1: error: no' >&2; echo 'a note' >&2", "k.cpp:1: error: no$"), ("echo broken >&2", "broken")],
)
def test_the_compiler_fails(monkeypatch, tmp_path, says, expected):
    """Also after having written half of its output."""
    half = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo half > "$2"; shift; done'
    compiler = script(tmp_path / "c++", f'[ "$1" = --version ] && exit 0\n{half}\n{says}\nexit 1')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("METAMOM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CompilerError, match=f"{re.escape(str(compiler))} cannot build metamom's kernels: {expected}"):
        load.__wrapped__()
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_a_failure_is_not_remembered(monkeypatch):
    """Who installs a compiler in a running session can go on."""
    load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "/nonexistent")
        with pytest.raises(CompilerError), kernels.native(CPU):
            pass
    assert compiled("unfold", draw(1, 1, 1, 1))[0].shape == (1, 1, 1, 9)
