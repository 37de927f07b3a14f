"""clusters/kubernetes, against the operator's published schema, and as Ray Serve reads it."""

import copy
import importlib.util
import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT
from ray.serve.schema import ServeDeploySchema

from serving.app import build
from serving.config import EndpointConfig
from serving.ingress import CALLS

FOLDER = ROOT / "clusters/kubernetes"
spec = importlib.util.spec_from_file_location("schema", FOLDER / "schema.py")
schema = importlib.util.module_from_spec(spec)
spec.loader.exec_module(schema)

KEPT = json.loads((FOLDER / "schema.json").read_text())
MANIFESTS = schema.manifests()
kinds = pytest.mark.parametrize("kind", list(MANIFESTS))
whole = pytest.mark.skipif(
    "KUBERAY_CRDS" not in os.environ,
    reason="KUBERAY_CRDS names no folder with the operator's published schema",
)


def cluster(kind):
    """The Ray cluster that a manifest describes."""
    described = MANIFESTS[kind]["spec"]
    return described.get("rayClusterConfig", described)


def groups(kind):
    described = cluster(kind)
    return [described["headGroupSpec"], *described["workerGroupSpecs"]]


@kinds
def test_the_operator_accepts_it(kind):
    jsonschema.validate(MANIFESTS[kind], KEPT["kinds"][kind])


def misspelt(described):
    described["workerGroupSpecs"][0]["minReplica"] = 0


def mistyped(described):
    described["workerGroupSpecs"][0]["maxReplicas"] = "16"


def unknown(described):
    described["authOptions"]["mode"] = "password"


def missing(described):
    del described["workerGroupSpecs"][0]["groupName"]


def deeply_misspelt(described):
    described["headGroupSpec"]["template"]["spec"]["containers"][0]["images"] = "biggan"


WRONG = {
    misspelt: "'minReplica' was unexpected",
    mistyped: "'16' is not of type 'integer'",
    unknown: "'password' is not one of",
    missing: "'groupName' is a required property",
    deeply_misspelt: "'images' was unexpected",
}


@pytest.mark.parametrize("mistake", WRONG, ids=lambda mistake: mistake.__name__)
@kinds
def test_a_wrong_one_is_refused(kind, mistake):
    wrong = copy.deepcopy(MANIFESTS[kind])
    mistake(wrong["spec"].get("rayClusterConfig", wrong["spec"]))
    with pytest.raises(jsonschema.ValidationError, match=WRONG[mistake]):
        jsonschema.validate(wrong, KEPT["kinds"][kind])


@whole
@kinds
def test_the_whole_published_schema_accepts_it(kind):
    published = schema.published(Path(os.environ["KUBERAY_CRDS"]), kind)
    jsonschema.validate(MANIFESTS[kind], schema.reduced(published, None))


@whole
def test_the_kept_part_of_the_schema_is_current():
    version = KEPT["operator"].removeprefix("KubeRay ")
    assert schema.make(Path(os.environ["KUBERAY_CRDS"]), version) == KEPT


@kinds
def test_it_is_closed_to_strangers(kind):
    assert cluster(kind)["authOptions"]["mode"] == "token"
    assert cluster(kind)["headGroupSpec"]["serviceType"] == "ClusterIP"
    documents = yaml.safe_load_all((FOLDER / f"{kind.lower()}.yaml").read_text())
    [policy] = [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]
    assert policy["policyTypes"] == ["Ingress"]
    for group in groups(kind):
        assert group["template"]["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
    own, *others = policy["ingress"]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    for rule in others:
        assert rule["ports"]
    assert "LoadBalancer" not in (FOLDER / f"{kind.lower()}.yaml").read_text()


def test_gpu_workers_scale_from_zero_and_bear_spot():
    head, *workers = groups("RayCluster")
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert cluster("RayCluster")["enableInTreeAutoscaling"]
    assert {group["minReplicas"] for group in workers} == {0}
    spot = workers[0]["template"]["spec"]
    assert spot["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert {toleration["key"] for toleration in spot["tolerations"]} >= {"nvidia.com/gpu", "spot"}


@kinds
def test_a_pod_has_time_to_drain_and_the_storage_by_role(kind):
    for group in groups(kind):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        environment = {pair["name"]: pair["value"] for pair in container["env"]}
        assert pod["serviceAccountName"] == "biggan"
        assert environment["BIGGAN_STORAGE"].startswith("s3://")
        assert not [name for name in environment if "KEY" in name or "TOKEN" in name]
    for group in groups(kind)[1:]:
        left = group["template"]["spec"]["terminationGracePeriodSeconds"]
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 10 <= left - drain <= 30


def test_the_pinned_ray_is_the_image_s_and_the_manifests():
    pinned = (ROOT / "constraints.txt").read_text().split("\nray==")[1].split("\n")[0]
    assert f"FROM rayproject/ray:{pinned}-py" in (FOLDER / "Dockerfile").read_text()
    assert {cluster(kind)["rayVersion"] for kind in MANIFESTS} == {pinned}


def test_deployments_call_each_other_as_elsewhere():
    head = cluster("RayService")["headGroupSpec"]["template"]["spec"]["containers"][0]
    environment = {variable["name"]: variable["value"] for variable in head["env"]}
    assert environment | CALLS == environment


def test_serve_reads_the_endpoint():
    deploy = ServeDeploySchema.model_validate(
        yaml.safe_load(MANIFESTS["RayService"]["spec"]["serveConfigV2"])
    )
    [application] = deploy.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    endpoint = EndpointConfig.model_validate(application.args)
    assert endpoint.max_replicas <= cluster("RayService")["workerGroupSpecs"][0]["maxReplicas"]
