"""Builds the engine with trtexec, runs the golden tensors through it, and writes a record for the workstation.

For a device that has TensorRT and any Python from 3.8 on, nothing else. Usage: python3 run_trtexec.py [TRTEXEC]
"""

# The device runs this file alone: standard library only, and nothing that Python 3.8 lacks.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import array
import base64
import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
RECORD = "trtexec-record.json"


def sha256(name):
    digest = hashlib.sha256()
    with open(os.path.join(HERE, name), "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def text(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().strip("\0\n ")
    except OSError:
        return ""


def run(arguments):
    print("$ " + " ".join(arguments), flush=True)
    done = subprocess.run(arguments, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-4000:] + "\ntrtexec failed with exit code %d" % done.returncode)
    return done.stdout


def outputs(path):
    """Name, shape and float32 values of each tensor that --exportOutput wrote."""
    with open(os.path.join(HERE, path), encoding="utf-8") as stream:
        content = re.sub(r"(?<![\w\"])(-?)(nan|inf)(?![\w\"])", "null", stream.read())
    tensors = {}
    for tensor in json.loads(content):
        if None in tensor["values"]:
            sys.exit("Output '%s' has values that are not finite." % tensor["name"])
        values = array.array("f", tensor["values"])
        if sys.byteorder == "big":
            values.byteswap()
        shape = [int(size) for size in tensor["dimensions"].split("x")]
        tensors[tensor["name"]] = {"shape": shape, "float32": base64.b64encode(values.tobytes()).decode("ascii")}
    return tensors


def main():
    trtexec = sys.argv[1] if len(sys.argv) > 1 else "trtexec"
    with open(os.path.join(HERE, "task.json"), encoding="utf-8") as stream:
        task = json.load(stream)
    if sha256(task["onnx"]) != task["onnx_sha256"]:
        sys.exit("'%s' was changed: copy the package again." % task["onnx"])
    built = run([trtexec] + task["build"])
    images, log = [], ""
    for golden in task["golden"]:
        exported = golden["name"] + ".outputs.json"
        log = run([trtexec] + golden["run"] + ["--exportOutput=" + exported])
        images.append({"inputs_sha256": sha256(golden["images"]), "outputs": outputs(exported)})
    version = re.search(r"TensorRT version: ([\d.]+)", built + log) or re.search(r"TensorRT v([\d.]+)", built + log)
    median = re.search(r"GPU Compute Time: .*?median = ([\d.]+) ms", log)
    record = {
        "format": "fcos-deploy trtexec record, version 1",
        "manifest_sha256": task["manifest_sha256"],
        "onnx_sha256": task["onnx_sha256"],
        "engine_sha256": sha256(task["engine"]),
        "images": images,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": version.group(1) if version else "",
        "median_ms": float(median.group(1)) if median else None,
        "machine": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "board": text("/proc/device-tree/model"),
            "release": text("/etc/nv_tegra_release").split("\n")[0],
        },
    }
    path = os.path.join(HERE, RECORD)
    with open(path + ".partial", "w", encoding="utf-8") as stream:
        json.dump(record, stream)
    os.replace(path + ".partial", path)
    print("wrote %s: take it to the workstation, and type there" % path)
    print("  fcos-deploy verify BUNDLE --trtexec-record %s" % RECORD)


if __name__ == "__main__":
    main()
