"""examples/kubernetes: fields that Kubernetes and the chart know, names that agree, arguments that serve the demo."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from caprese_serve.demo import ADAPTERS, MODEL
from tests.support.dockerfiles import ROOT, instructions

FOLDER = ROOT / "examples/kubernetes"
Object = dict[str, Any]

# Fields of Kubernetes' objects (API v1, apps/v1) that the manifests may use; "*": any names, "[]": of each element.
PROBE: Object = {"httpGet": {"path": 0, "port": 0}, "initialDelaySeconds": 0, "periodSeconds": 0, "timeoutSeconds": 0,
                 "failureThreshold": 0}  # fmt: skip
METADATA: Object = {"name": 0, "labels": {"*": 0}, "annotations": {"*": 0}}
POD_SECURITY: Object = {"runAsNonRoot": 0, "runAsUser": 0, "runAsGroup": 0, "fsGroup": 0, "seccompProfile": {"type": 0}}
SECURITY: Object = {"allowPrivilegeEscalation": 0, "runAsNonRoot": 0, "capabilities": {"drop": 0}}
MOUNT: Object = {"name": 0, "mountPath": 0, "readOnly": 0}
VOLUME: Object = {
    "name": 0,
    "persistentVolumeClaim": {"claimName": 0, "readOnly": 0},
    "emptyDir": {"medium": 0, "sizeLimit": 0},
}
CONTAINER: Object = {
    "name": 0, "image": 0, "command": 0, "args": 0, "ports": {"[]": {"name": 0, "containerPort": 0}},
    "env": {"[]": {"name": 0, "value": 0, "valueFrom": {"secretKeyRef": {"name": 0, "key": 0, "optional": 0}}}},
    "resources": {"requests": {"*": 0}, "limits": {"*": 0}}, "securityContext": SECURITY,
    "startupProbe": PROBE, "readinessProbe": PROBE, "livenessProbe": PROBE, "volumeMounts": {"[]": MOUNT},
}  # fmt: skip
POD: Object = {"restartPolicy": 0, "terminationGracePeriodSeconds": 0, "enableServiceLinks": 0,
               "securityContext": POD_SECURITY, "containers": {"[]": CONTAINER}, "volumes": {"[]": VOLUME}}  # fmt: skip
KINDS: dict[tuple[str, str], Object] = {
    ("v1", "Pod"): POD,
    ("v1", "PersistentVolumeClaim"): {"accessModes": 0, "resources": {"requests": {"*": 0}}},
    ("v1", "Service"): {"selector": {"*": 0}, "ports": {"[]": {"name": 0, "port": 0, "targetPort": 0}}},
    ("apps/v1", "Deployment"): {
        "replicas": 0,
        "strategy": {"type": 0, "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}},
        "selector": {"matchLabels": {"*": 0}},
        "template": {"metadata": METADATA, "spec": POD},
    },
}
# Of the chart's values.schema.json, 0.1.12: the names there, which the chart passes over silently if misspelt.
CHART: Object = {
    "servingEngineSpec": {
        "labels": {"*": 0}, "containerPort": 0, "runtimeClassName": 0, "imagePullPolicy": 0,
        "securityContext": POD_SECURITY, "containerSecurityContext": SECURITY,
        "startupProbe": PROBE, "readinessProbe": PROBE, "livenessProbe": PROBE,
        "modelSpec": {"[]": {
            "name": 0, "repository": 0, "tag": 0, "modelURL": 0, "replicaCount": 0, "requestCPU": 0, "requestMemory": 0,
            "requestGPU": 0, "limitMemory": 0, "pvcStorage": 0, "pvcAccessMode": 0, "podAnnotations": {"*": 0},
            "extraVolumes": {"[]": VOLUME}, "extraVolumeMounts": {"[]": MOUNT},
            "vllmConfig": {"enablePrefixCaching": 0, "maxModelLen": 0, "dtype": 0, "tensorParallelSize": 0,
                           "maxNumSeqs": 0, "gpuMemoryUtilization": 0, "extraArgs": 0},
        }},
    },
    "routerSpec": {"routingLogic": 0},
}  # fmt: skip


def unknown(value: Any, fields: Any, path: str = "") -> Iterator[str]:
    """Paths of fields that are not in the tree of known ones."""
    if fields == 0:
        return
    if "[]" in fields:
        assert isinstance(value, list), path
        for each in value:
            yield from unknown(each, fields["[]"], f"{path}[]")
        return
    assert isinstance(value, dict), path
    for key, each in value.items():
        known = fields.get(key, fields.get("*"))
        if known is None:
            yield f"{path}.{key}"
        else:
            yield from unknown(each, known, f"{path}.{key}")


def objects(name: str) -> dict[str, Object]:
    """A file's objects by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / name).read_text())}


VALUES = yaml.safe_load((FOLDER / "production-stack.yaml").read_text())
ENGINE, (MODEL_SPEC,) = VALUES["servingEngineSpec"], VALUES["servingEngineSpec"]["modelSpec"]
PLAIN, COPY = objects("caprese.yaml"), objects("adapters.yaml")
POD_SPEC = PLAIN["Deployment"]["spec"]["template"]["spec"]
(SERVER,) = POD_SPEC["containers"]


def chart_command() -> list[str]:
    """What the chart makes of the values: its deployment-vllm-multi.yaml, as far as they use it."""
    config = MODEL_SPEC["vllmConfig"]
    prefix = "--enable-prefix-caching" if config.get("enablePrefixCaching") else "--no-enable-prefix-caching"
    port = str(ENGINE["containerPort"])
    return [
        *("vllm", "serve", MODEL_SPEC["modelURL"], "--host", "0.0.0.0", "--port", port, prefix),
        *("--max-model-len", str(config["maxModelLen"]), *config["extraArgs"]),
    ]


def test_every_file_is_known() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md", "adapters.yaml", "caprese.yaml", "production-stack.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("thing", [*PLAIN.values(), *COPY.values()], ids=lambda thing: thing["kind"])
def test_objects_have_known_fields(thing: Object) -> None:
    fields = KINDS[thing["apiVersion"], thing["kind"]]
    assert not list(unknown(thing, {"apiVersion": 0, "kind": 0, "metadata": METADATA, "spec": fields}))


def test_values_have_known_fields() -> None:
    assert not list(unknown(VALUES, CHART))
    assert list(unknown({"routerSpec": {"routingLogik": "x"}}, CHART)) == [".routerSpec.routingLogik"]


def test_names_agree() -> None:
    """Selectors, ports, mounts and the claim of adapters.yaml."""
    deployment, service = PLAIN["Deployment"]["spec"], PLAIN["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["selector"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
    assert [port["targetPort"] for port in service["ports"]] == list(ports) == ["http"]
    for volumes, mounts in ((POD_SPEC["volumes"], SERVER["volumeMounts"]),
                            (MODEL_SPEC["extraVolumes"], MODEL_SPEC["extraVolumeMounts"])):  # fmt: skip
        assert {volume["name"] for volume in volumes} == {mount["name"] for mount in mounts}
        claims = [each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each]
        assert claims == [COPY["PersistentVolumeClaim"]["metadata"]["name"]]


def test_probes_and_scrapes_ask_the_server() -> None:
    port = ENGINE["containerPort"]
    assert SERVER["ports"][0]["containerPort"] == port == 8000
    for where, named in ((SERVER, "http"), (ENGINE, port)):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert where[probe]["httpGet"] == {"path": "/health", "port": named}
        assert where["startupProbe"]["periodSeconds"] * where["startupProbe"]["failureThreshold"] >= 1200
    annotations = PLAIN["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == MODEL_SPEC["podAnnotations"]
    assert annotations == {
        "prometheus.io/scrape": "true", "prometheus.io/path": "/metrics", "prometheus.io/port": str(port),
    }  # fmt: skip


def test_users_and_folders_are_the_images() -> None:
    """The user of the image owns what it writes to; models are kept where the image's HF_HOME is."""
    for dockerfile in (ROOT / "deploy").glob("Dockerfile.*"):
        text = {each.name: each.text for each in instructions(dockerfile)}
        user, _, group = text["USER"].partition(":")
        for context in (POD_SPEC["securityContext"], COPY["Pod"]["spec"]["securityContext"], ENGINE["securityContext"]):
            assert (context["runAsUser"], context["runAsGroup"]) == (int(user), int(group))
            assert context["runAsNonRoot"]
        assert "HF_HOME=/data" in text["ENV"]
    assert "/data" in [mount["mountPath"] for mount in SERVER["volumeMounts"]]


@pytest.mark.parametrize("words", [SERVER["args"], chart_command()[2:]], ids=["caprese.yaml", "production-stack.yaml"])
def test_arguments_serve_the_demo(
    words: list[str], caprese: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the demo's model and adapter in the places of theirs, `caprese serve` checks them and becomes vLLM."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    words = list(words)
    assert all(isinstance(word, str) for word in words), "args are strings: quote numbers"
    words[0] = str(MODEL)
    at = words.index("--caprese-weights") + 1
    assert words[at].startswith(tuple(mount["mountPath"] for mount in SERVER["volumeMounts"]))
    words[at] = str(ADAPTERS["griffin"])
    assert caprese("serve", *words, "--dry-run") == 0
    out, err = capsys.readouterr()
    assert shlex.split(out)[1:] == ["serve", *words]
    assert "fits: method griffin" in " ".join(err.split())


def test_vllm_knows_the_arguments() -> None:
    code = """
import json, sys
from caprese_vllm import plugin
plugin.register()
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.loads(sys.argv[1]):
    parser = FlexibleArgumentParser()
    make_arg_parser(parser.add_subparsers().add_parser("serve"))
    found = parser.parse_args(["serve", *words])
    assert found.additional_config["caprese"]["weights"] == "/adapters/adapters.safetensors", found
    assert found.max_model_len == 8192 and found.port == 8000, found
"""
    lines = json.dumps([SERVER["args"], chart_command()[2:]])
    done = subprocess.run([sys.executable, "-c", code, lines], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_metrics_in_the_charts_multiprocess_mode(tmp_path: Path) -> None:
    """The chart sets PROMETHEUS_MULTIPROC_DIR, where metrics go through files."""
    code = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from caprese_vllm.metrics import _gauge
_gauge("generated_tokens_total", "x", "path").labels("sparse").set(7)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.environ['PROMETHEUS_MULTIPROC_DIR'] = {str(tmp_path)!r}\n{code}"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'caprese:generated_tokens_total{path="sparse"} 7.0' in done.stdout.splitlines()
