"""The detector: opening, images in, detections out, one by one and in batches."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fcos_deploy import ComputeType, Detections, Detector, Precision, SessionOptions, Tail
from fcos_deploy.core.artifact import read_contract
from fcos_deploy.core.backend import Session, Tensors
from fcos_deploy.core.contract import TensorSpec
from fcos_deploy.core.enums import Orientation
from fcos_deploy.core.errors import BackendError, BackendLoadError, ConfigError, ImageError
from fcos_deploy.core.preprocess import InputDtype, PreprocessSpec, SizeRule

pytest.importorskip("onnxruntime")

_ONE_THREAD = SessionOptions(threads=1)
Images = list[NDArray[np.uint8]]


@pytest.fixture(scope="module")
def detector(tiny_onnx: Path) -> Iterator[Detector]:
    with Detector.open(tiny_onnx, options=_ONE_THREAD) as opened:
        yield opened


@pytest.fixture(scope="module")
def batches(tiny_export: Callable[..., Path]) -> dict[str, Path]:
    """ONNX files of a fixed batch of two and of an open one, and with the nms tail."""
    return {
        "two": tiny_export(batch=2),
        "open": tiny_export(batch=None),
        "nms": tiny_export(tail=Tail.NMS, batch=2),
    }


def _assert_equal(left: Detections, right: Detections) -> None:
    np.testing.assert_array_equal(left.labels, right.labels)
    np.testing.assert_array_equal(left.scores, right.scores)
    np.testing.assert_array_equal(left.boxes, right.boxes)


def _assert_close(left: Detections, right: Detections) -> None:
    np.testing.assert_array_equal(left.labels, right.labels)
    np.testing.assert_allclose(left.scores, right.scores, atol=1e-5)
    np.testing.assert_allclose(left.boxes, right.boxes, atol=1e-2)


def test_each_kind_of_file_has_its_usual_backend(tiny_checkpoint: Path, tiny_onnx: Path, tiny_ir: Path) -> None:
    for path, backend in ((tiny_checkpoint, "pytorch"), (tiny_onnx, "onnxruntime"), (tiny_ir, "openvino")):
        with Detector.open(path, options=_ONE_THREAD) as opened:
            assert opened.session.description["backend"] == backend


def test_detections_are_of_the_image(detector: Detector, blobs: Images) -> None:
    assert detector.names == ("red", "white", "platelet")
    for image in blobs:
        found = detector.detect(image)
        assert 0 < len(found) <= 100
        assert (np.diff(found.scores) <= 0).all()
        assert (found.scores > 0.2).all()
        assert set(found.labels) <= {0, 1, 2}
        height, width = image.shape[:2]
        assert (found.boxes >= 0).all()
        assert (found.boxes <= np.array([width, height, width, height]) + 0.01).all()


def test_a_path_is_read(detector: Detector, blobs: Images, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "blobs.png"
    Image.fromarray(blobs[0]).save(path)
    _assert_equal(detector.detect(path), detector.detect(blobs[0]))
    _assert_equal(detector.detect(str(path)), detector.detect(blobs[0]))
    _assert_equal(detector.detect_batch([path])[0], detector.detect(blobs[0]))


def test_the_stages_make_the_whole(detector: Detector, blobs: Images) -> None:
    feeds, letterboxes = detector.prepare([blobs[2]])
    (found,) = detector.finish(detector.infer(feeds), letterboxes)
    _assert_equal(found, detector.detect(blobs[2]))


def test_prepared_feeds_are_not_overwritten(detector: Detector, blobs: Images) -> None:
    feeds, _ = detector.prepare([blobs[0]])
    kept = feeds["images"].copy()
    detector.prepare([blobs[1]])
    detector.detect(blobs[1])
    np.testing.assert_array_equal(feeds["images"], kept)


def test_batches_of_any_length_equal_single_images(detector: Detector, blobs: Images) -> None:
    images = [blobs[index % 4] for index in range(18)]  # more than are held in memory at a time
    for one, image in zip(detector.detect_batch(images), images, strict=True):
        _assert_equal(one, detector.detect(image))
    assert detector.detect_batch([]) == []


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["two", "open", "nms"])
def test_fixed_and_open_batches_equal_single_images(
    detector: Detector, batches: dict[str, Path], blobs: Images, name: str, backend: str
) -> None:
    pytest.importorskip(backend)
    with Detector.open(batches[name], backend=backend, options=_ONE_THREAD) as batched:
        for images in (blobs[:1], blobs[:3], blobs):
            for one, image in zip(batched.detect_batch(images), images, strict=True):
                _assert_close(one, detector.detect(image))
        _assert_close(batched.detect(blobs[3]), detector.detect(blobs[3]))


def test_a_fixed_batch_takes_no_more(batches: dict[str, Path], blobs: Images) -> None:
    with (
        Detector.open(batches["two"], options=_ONE_THREAD) as batched,
        pytest.raises(ConfigError, match="2 images at a time, got 3"),
    ):
        batched.prepare(blobs[:3])


def test_sizes_that_follow_the_image(tiny_checkpoint: Path, blobs: Images) -> None:
    from fcos_deploy.checkpoints.load import load_checkpoint

    loaded = load_checkpoint(tiny_checkpoint)
    spec = PreprocessSpec(
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        pixel_scale=255.0,
        shortest=128,
        longest=256,
        size_rule=SizeRule.TORCHVISION,
        input_dtype=InputDtype.FLOAT32,
    )
    with Detector.of_network(loaded.model, loaded.contract.with_preprocess(spec), options=_ONE_THREAD) as free:
        together = free.detect_batch([*blobs, blobs[0]])
        for one, image in zip(together, [*blobs, blobs[0]], strict=True):
            assert len(one) > 0
            _assert_close(one, free.detect(image))
        with pytest.raises(ConfigError, match="one input size"):
            free.prepare(blobs)


def test_a_higher_threshold_is_a_filter_and_a_lower_one_finds_more(tiny_onnx: Path, blobs: Images) -> None:
    with (
        Detector.open(tiny_onnx, options=_ONE_THREAD) as usual,
        Detector.open(tiny_onnx, options=_ONE_THREAD, score_threshold=0.4) as strict,
        Detector.open(tiny_onnx, options=_ONE_THREAD, score_threshold=0.01) as lenient,
    ):
        _assert_equal(strict.detect(blobs[1]), usual.detect(blobs[1]).above(0.4))
        assert lenient.contract.decode.score_threshold == 0.01
        assert lenient.detect(blobs[2]).scores.min() < 0.2 < usual.detect(blobs[2]).scores.min()


def test_a_threshold_inside_the_graph_cannot_be_lowered(batches: dict[str, Path], blobs: Images) -> None:
    with Detector.open(batches["nms"], options=_ONE_THREAD, score_threshold=0.4) as strict:
        assert strict.detect(blobs[0]).scores.min() >= 0.4
    with pytest.raises(ConfigError, match=r"below the 0\.2 built into the 'nms' tail") as caught:
        Detector.open(batches["nms"], score_threshold=0.1)
    assert "--tail raw" in caught.value.hint


def test_a_precision_that_the_file_is_not_in(tiny_onnx: Path) -> None:
    with pytest.raises(ConfigError, match=r"'tiny\.onnx' is fp32, int8 was asked for"):
        Detector.open(tiny_onnx, precision=Precision.INT8)


def test_a_backend_that_does_not_open_the_file(tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    with pytest.raises(ConfigError, match=r"'onnxruntime' does not open 'tiny\.safetensors'") as caught:
        Detector.open(tiny_checkpoint, backend="onnxruntime")
    assert "pytorch" in caught.value.hint
    with pytest.raises(ConfigError, match="no backend 'tensorflow'"):
        Detector.open(tiny_onnx, backend="tensorflow")


def test_opening_one_runtime_does_not_import_the_others(tiny_onnx: Path) -> None:
    code = (
        "import sys; from fcos_deploy import Detector; Detector.open(sys.argv[1]).close();"
        "print(sorted({'torch', 'openvino', 'onnx', 'tensorrt', 'asyncio'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tiny_onnx)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_without_an_installed_runtime_says_what_to_install(tmp_path: Path) -> None:
    for suffix, extra in ((".engine", "tensorrt"), (".onnx", "onnxruntime")):
        blocked = (
            "import sys; sys.modules.update({m: None for m in "
            "('onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'tensorrt_libs')});"
            "from fcos_deploy import Detector; Detector.open(sys.argv[1])"
        )
        model = tmp_path / f"model{suffix}"
        model.write_bytes(b"x")
        done = subprocess.run([sys.executable, "-c", blocked, str(model)], capture_output=True, text=True, check=False)
        assert "MissingDependencyError: No backend is installed that opens" in done.stderr
        assert f"pip install 'fcos-deploy[{extra}]'" in done.stderr


def test_what_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(BackendLoadError, match="does not exist"):
        Detector.open(tmp_path / "missing.onnx")
    (tmp_path / "model.tflite").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"not a checkpoint's, and the suffix '\.tflite' is unknown") as caught:
        Detector.open(tmp_path / "model.tflite")
    assert ".onnx" in caught.value.hint


def test_a_contract_that_is_not_the_graphs(tiny_onnx: Path) -> None:
    contract = read_contract(tiny_onnx)
    wider = replace(contract.preprocess, width=192)
    with pytest.raises(
        BackendLoadError, match="is uint8\\[\\?, 3, 128, 192\\], the model has uint8\\[1, 3, 128, 160\\]"
    ):
        Detector.open(tiny_onnx, options=SessionOptions(contract=contract.with_preprocess(wider)))
    with pytest.raises(BackendLoadError, match="tail 'nms' has outputs"):
        Detector.open(tiny_onnx, options=SessionOptions(contract=replace(contract, tail=Tail.NMS)))


def test_a_foreign_placement_is_refused_before_it_runs(tiny_onnx: Path) -> None:
    foreign = replace(read_contract(tiny_onnx), precision=Precision.INT8, placement="onnxruntime-cpu")
    with pytest.raises(BackendLoadError, match="'onnxruntime-cpu'") as caught:
        Detector.open(tiny_onnx, backend="openvino", options=SessionOptions(contract=foreign))
    assert "--for openvino" in caught.value.hint


def test_a_compute_type_that_is_not_there_is_an_error(tiny_onnx: Path) -> None:
    with pytest.raises(ConfigError, match="not in bf16"):
        Detector.open(tiny_onnx, options=SessionOptions(compute=ComputeType.BF16))


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_what_is_not_an_image(detector: Detector, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ImageError, match="uint8\\[h, w, 3\\]"):
        detector.detect(image)
    with pytest.raises(ImageError):
        detector.detect_batch([image])


def test_closing_is_final_and_may_be_repeated(tiny_onnx: Path, blobs: Images) -> None:
    with Detector.open(tiny_onnx, options=_ONE_THREAD) as opened:
        opened.detect(blobs[0])
    opened.close()
    for call in (opened.detect, lambda image: opened.detect_batch([image])):
        with pytest.raises(BackendError, match="closed"):
            call(blobs[0])


class _OneAtATime(Session):
    """A session that is not made for threads, and notices them."""

    thread_safe = False

    def __init__(self, inner: Session) -> None:
        super().__init__(inputs=inner.inputs, outputs=inner.outputs, description={})
        self.inner, self.inside, self.overlapped = inner, 0, False

    def _run(self, feeds: Tensors) -> Tensors:
        self.inside += 1
        self.overlapped |= self.inside > 1
        time.sleep(0.002)
        outputs = self.inner.run(feeds)
        self.inside -= 1
        return outputs


def test_a_session_that_is_not_made_for_threads_is_used_in_turn(detector: Detector, blobs: Images) -> None:
    session = _OneAtATime(detector.session)
    alone = Detector(session, detector.contract)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(alone.detect, blobs * 6))
    assert not session.overlapped
    for one, image in zip(found, blobs * 6, strict=True):
        _assert_equal(one, detector.detect(image))


def test_a_dynamic_axis_takes_the_contracts_canvas(detector: Detector, blobs: Images) -> None:
    session = _OneAtATime(detector.session)
    session.inputs = (TensorSpec("images", "uint8", (None, 3, None, None)),)
    feeds, _ = Detector(session, detector.contract).prepare(blobs[:3])
    assert feeds["images"].shape == (3, 3, 128, 160)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, fcos_deploy; print(sorted({'numpy', 'torch', 'cv2', 'onnxruntime'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    import fcos_deploy

    assert [name for name in fcos_deploy.__all__ if getattr(fcos_deploy, name, None) is None] == []
    assert dir(fcos_deploy) == sorted(fcos_deploy.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Detectr'"):
        _ = fcos_deploy.Detectr


def test_threads_reuse_their_own_buffers(detector: Detector, blobs: Images) -> None:
    seen: dict[int, set[int]] = {}
    lock = threading.Lock()

    def address(image: NDArray[np.uint8]) -> None:
        images = detector._request([image])._tensors["images"]
        with lock:
            seen.setdefault(threading.get_ident(), set()).add(images.ctypes.data)

    address(blobs[0])
    address(blobs[1])
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(address, blobs * 10))
    assert all(len(addresses) == 1 for addresses in seen.values())
    assert len(set().union(*seen.values())) == len(seen)


@pytest.mark.parametrize("kind", ["two", "open", "nms"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_is_kept_for_the_next_image_changes_no_detection(
    backend: str, kind: str, batches: dict[str, Path], blobs: Images
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    tall, wide = blobs[1][:, :77], blobs[2][:50]
    with Detector.open(batches[kind], backend=backend, options=_ONE_THREAD) as kept:
        for image in (blobs[0], blobs[1], tall, wide, tall[:, ::-1], blobs[0]):
            feeds, letterboxes = kept.prepare([image])
            (expected,) = kept.finish(kept.infer(feeds), letterboxes)
            _assert_equal(kept.detect(image), expected)
        images = [blobs[0], tall, wide, blobs[1], wide, tall]
        for detections, image in zip(kept.detect_batch(images), images, strict=True):
            _assert_close(detections, kept.detect(image))
        with pytest.raises(ImageError, match="must be uint8"):
            kept.detect(blobs[0].astype(np.float32))
    for call in (lambda: kept.detect(blobs[0]), lambda: kept.detect_batch(blobs[:1])):
        with pytest.raises(BackendError, match="closed"):
            call()


def test_a_file_is_turned_as_the_contract_says(tiny_onnx: Path, tmp_path: Path) -> None:
    """The tiny checkpoint is torchvision's, whose datasets read pixels as they are stored."""
    pillow = pytest.importorskip("PIL.Image")
    path, exif = tmp_path / "turned.jpg", pillow.Exif()
    exif[0x0112] = 6
    pillow.new("RGB", (40, 24), (10, 200, 30)).save(path, exif=exif)
    with Detector.open(tiny_onnx) as detector:
        assert detector.read(path).shape == (24, 40, 3)
    contract = read_contract(tiny_onnx)
    upright = contract.with_preprocess(replace(contract.preprocess, orientation=Orientation.EXIF))
    with Detector.open(tiny_onnx, options=SessionOptions(contract=upright)) as detector:
        assert detector.read(path).shape == (40, 24, 3)
