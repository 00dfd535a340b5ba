"""Detects on many images with an actor pool of a Ray cluster, and evaluates as ``fcos-deploy evaluate`` does.

    python examples/ray/evaluate.py BUNDLE --images DIR --annotations FILE --predictions kept --workers 2

Every worker is a process with a ``Detector`` of its own. On each node one process checks the bundle and keeps the
checked bytes, which nobody can change, and the workers of that node open those. Detections are kept, image by image,
in the folder ``--predictions``: a run that is interrupted goes on from there, and the evaluation at the end reads them,
so that its AP is the one of a single process to the last digit. The nodes must see the images under the same paths.

Without ``--annotations`` a line of JSON for each image is printed instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fcos_deploy import Detector, SessionOptions, open_bundle
from fcos_deploy.accuracy.dataset import EvaluationImage, folder_images, load_coco
from fcos_deploy.accuracy.evaluate import EvaluationRequest, evaluate, evaluation_json
from fcos_deploy.accuracy.predictions import PredictionStore, kept_predictions, stable_description
from fcos_deploy.bundle.selection import select_runnable
from fcos_deploy.core.detections import Detections
from fcos_deploy.core.errors import BackendError, FcosDeployError
from fcos_deploy.core.trust import Trust
from fcos_deploy.detector import DetectorSpec

CHUNK = 4  # images of a task: what a worker that dies loses at most
TRIES = 3  # of a task whose worker dies

Chunk = tuple[EvaluationImage, ...]
Found = list[tuple[int, Detections]]


@ray.remote(num_cpus=0)
class NodeBundle:
    """The one process of a node that checks the bundle. Workers open its copies, which are sealed."""

    def __init__(self, model: Path, trust: Trust) -> None:
        self._bundle = open_bundle(
            model, public_keys=trust.public_keys, expect_name=trust.name, min_version=trust.min_version
        )
        self._selection, _ = select_runnable(self._bundle)
        self._path = self._bundle.path(self._selection.artifact.path)

    def opened(self) -> tuple[Path, str]:
        """The artifact that runs on this node, and its backend."""
        return self._path, self._selection.backend


@ray.remote(num_cpus=1, max_restarts=TRIES)
class Worker:
    """Detects on chunks of images; one that dies is started again by Ray."""

    def __init__(self, path: Path, backend: str, options: SessionOptions, expected: dict[str, str]) -> None:
        self._detector = Detector.open(path, backend=backend, options=options)
        different = {
            name: text for name, text in stable_description(self._detector).items() if text != expected.get(name)
        }
        if different:
            raise BackendError(
                f"This node runs another detector: {different} in place of {expected}.",
                hint="use nodes with the same processor and the same versions of the runtime",
            )

    def detect(self, chunk: Chunk) -> tuple[int, Found]:
        """The process that did it, and the detections by image id."""
        return os.getpid(), [(image.image_id, self._detector.detect(image.path)) for image in chunk]


def collect(
    model: Path,
    images: Sequence[EvaluationImage],
    *,
    folder: Path,
    workers: int,
    options: SessionOptions,
    trust: Trust,
    on_result: Callable[[int, int], None] | None = None,
) -> tuple[dict[int, Detections], tuple[str, ...]]:
    """Detections on every image, kept in ``folder``, and the names of the classes.

    ``on_result``: called with the process that answered and the number of images so far.
    """
    spec = DetectorSpec(model=model, options=options.trusting(trust))
    with spec.open() as detector:
        path = kept_predictions(folder, spec, detector=detector, images=images)
        expected, names = stable_description(detector), detector.names
    with PredictionStore(path) as store:
        remaining = [image for image in images if image.image_id not in store.detections]
        chunks = [tuple(remaining[start : start + CHUNK]) for start in range(0, len(remaining), CHUNK)]
        for process, detections in run(model, chunks, workers, options, trust, expected):
            for image_id, objects in detections:
                store.add(image_id, objects)
            if on_result is not None:
                on_result(process, len(store.detections))
        return store.detections, names


def run(
    model: Path,
    chunks: Sequence[Chunk],
    workers: int,
    options: SessionOptions,
    trust: Trust,
    expected: dict[str, str],
) -> Iterator[tuple[int, Found]]:
    """The results of all chunks as they come; one whose worker or node dies is given to another worker.

    Raises:
        RayActorError: the workers of a chunk die again and again.
        BackendError: no node is left.
    """
    on_node = [NodeAffinitySchedulingStrategy(node_id=node, soft=False) for node in living_nodes()]
    bundles = [NodeBundle.options(scheduling_strategy=place).remote(model, trust) for place in on_node]
    opened = ray.get([bundle.opened.remote() for bundle in bundles])
    places = list(zip(on_node, opened, strict=True))
    pool = deque(
        (Worker.options(scheduling_strategy=place).remote(path, backend, options, expected), place.node_id)
        for place, (path, backend) in itertools.islice(itertools.cycle(places), min(workers, len(chunks)))
    )
    waiting, tries, running = deque(chunks), dict.fromkeys(chunks, 0), {}
    while waiting or running:
        while waiting and pool:
            (worker, node), chunk = pool.popleft(), waiting.popleft()
            running[worker.detect.remote(chunk)] = worker, node, chunk
        if not running:
            raise BackendError(
                f"No node is left, and {len(waiting)} chunks of images are.",
                hint="start nodes, and the same command: what was detected is kept",
            )
        (done,), _ = ray.wait(list(running), num_returns=1)
        worker, node, chunk = running.pop(done)
        try:
            yield ray.get(done)
        except (RayActorError, ActorUnschedulableError):
            waiting.append(chunk)
            if node not in living_nodes():
                continue  # Ray starts no worker there again
            tries[chunk] += 1
            if tries[chunk] >= TRIES and not running:
                raise
        pool.append((worker, node))


def living_nodes() -> list[str]:
    """The nodes of the cluster by their identifiers."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def main() -> None:
    """Print the evaluation as JSON, or a line of JSON an image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path)
    parser.add_argument("--predictions", type=Path, required=True, help="folder to keep detections in")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of the runtime, in each worker")
    parser.add_argument("--public-key", action="append", default=[], help="one of them must have signed the bundle")
    parser.add_argument("--address", help="of a running cluster; without it one is started on this machine")
    arguments = parser.parse_args()
    dataset = load_coco(arguments.annotations, images=arguments.images) if arguments.annotations else None
    images = dataset.images if dataset else folder_images(arguments.images)
    options, trust = SessionOptions(threads=arguments.threads), Trust(public_keys=tuple(arguments.public_key))
    local = {} if arguments.address else {"num_cpus": arguments.workers, "include_dashboard": False}
    ray.init(address=arguments.address, log_to_driver=False, **local)
    detections, names = collect(
        arguments.bundle.resolve(),
        images,
        folder=arguments.predictions,
        workers=arguments.workers,
        options=options,
        trust=trust,
        on_result=lambda _, done: print(f"{done} of {len(images)} images", file=sys.stderr),
    )
    ray.shutdown()
    if dataset is None:
        for image in images:
            objects = detections[image.image_id].to_list(names)
            print(json.dumps({"image": str(image.path), "detections": objects}))
        return
    request = EvaluationRequest(
        candidates=(DetectorSpec(model=arguments.bundle.resolve(), options=options.trusting(trust)),),
        images=arguments.images,
        annotations=arguments.annotations,
        predictions=arguments.predictions,
    )
    (evaluation,) = evaluate(request).candidates
    print(json.dumps(evaluation_json(evaluation), indent=1))


if __name__ == "__main__":
    try:
        main()
    except FcosDeployError as error:
        sys.exit(f"error: {error.message}\nhint:  {error.hint}")
