"""cluster.yaml launched by Ray's own code against a local EC2, up to where SSH would begin."""

import shutil
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from conftest import ROOT
from moto.server import ThreadedMotoServer
from ray.autoscaler._private import commands
from ray.autoscaler.v2.instance_manager.config import FileConfigReader
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

FILE = ROOT / "cluster.yaml"


class Ssh:
    """In place of the thread that sets the head up over SSH: this machine's home becomes its."""

    exitcode = 0
    asked: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **asked):
        type(self).asked = asked
        for place in ("~/ray_bootstrap_config.yaml", "~/ray_bootstrap_key.pem"):
            shutil.copy(asked["file_mounts"][place], Path(place).expanduser())

    def start(self):
        pass

    def join(self):
        pass


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    """An AWS account on loopback with what the README asks for; nothing else is there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    home = tmp_path_factory.mktemp("home")  # Ray puts the key there.
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("0" * 64)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "nobody")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        environment.setenv("HOME", str(home))
        environment.chdir(ROOT)  # Paths in the file count from there.
        environment.delenv("AWS_PROFILE", raising=False)
        boto3.client("iam", "us-west-2").create_instance_profile(InstanceProfileName="biggan")
        environment.setattr(commands, "NodeUpdaterThread", Ssh)
        yield boto3.client("ec2", "us-west-2")
    server.stop()


def up(path):
    """`ray up`, then one machine of each type of workers as the head's autoscaler launches them;
    returns the head's configuration."""
    commands.create_or_update_cluster(
        str(path),
        override_min_workers=None,
        override_max_workers=None,
        no_restart=False,
        restart_only=False,
        yes=True,
        no_config_cache=True,
    )
    reader = FileConfigReader(Path.home() / "ray_bootstrap_config.yaml")
    config = reader.get_cached_autoscaling_config()._configs
    provider = commands._get_node_provider(config["provider"], config["cluster_name"])
    autoscaler = NodeProviderAdapter(provider, reader)
    workers = set(config["available_node_types"]) - {config["head_node_type"]}
    autoscaler.launch(dict.fromkeys(workers, 1), "request")
    autoscaler._main_executor.shutdown()
    autoscaler._node_launcher_executors.shutdown()
    assert not [error.__cause__ for error in autoscaler.poll_errors()]
    return config


def tags(thing):
    return {tag["Key"]: tag["Value"] for tag in thing["Tags"]}


@pytest.fixture(scope="module")
def config(account):
    return up(FILE)


@pytest.fixture(scope="module")
def machines(account, config):
    """What runs then, by node type."""
    found = [m for r in account.describe_instances()["Reservations"] for m in r["Instances"]]
    return {tags(machine)["ray-user-node-type"]: machine for machine in found}


@pytest.fixture(scope="module")
def described():
    return yaml.safe_load(FILE.read_text())


@pytest.mark.parametrize("kind", ["head", "gpu-spot", "gpu-on-demand"])
def test_a_machine_is_what_the_file_says(kind, described, machines, account):
    wanted, machine = described["available_node_types"][kind]["node_config"], machines[kind]
    assert machine["InstanceType"] == wanted["InstanceType"]
    assert machine["ImageId"] == wanted["ImageId"]
    assert machine["IamInstanceProfile"]["Arn"].endswith(":instance-profile/biggan")
    assert machine["MetadataOptions"]["HttpTokens"] == "required"
    assert (machine.get("InstanceLifecycle") == "spot") == (kind == "gpu-spot")
    assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["biggan"]
    assert tags(machine)["ray-cluster-name"] == "biggan"
    assert tags(machine)["ray-node-type"] == ("head" if kind == "head" else "worker")
    attached = [disk["Ebs"]["VolumeId"] for disk in machine["BlockDeviceMappings"]]
    [disk] = account.describe_volumes(VolumeIds=attached)["Volumes"]
    assert (disk["Size"], disk["VolumeType"], disk["Encrypted"]) == (150, "gp3", True)


def test_the_key_is_of_this_account_and_lies_here(machines, account, config):
    [pair] = account.describe_key_pairs()["KeyPairs"]
    assert {machine["KeyName"] for machine in machines.values()} == {pair["KeyName"]}
    key = Ssh.asked["auth_config"]["ssh_private_key"]
    assert key.endswith(f"{pair['KeyName']}.pem")
    assert "PRIVATE KEY" in Path(key).read_text()


def opened(group):
    """What a security group lets in: protocol, port, and from where."""
    return {
        (rule["IpProtocol"], rule.get("FromPort") if rule["IpProtocol"] != "-1" else None, source)
        for rule in group["IpPermissions"]
        for source in [
            *(pair["GroupId"] for pair in rule["UserIdGroupPairs"]),
            *(cidr["CidrIp"] for cidr in rule["IpRanges"]),
            *(cidr["CidrIpv6"] for cidr in rule["Ipv6Ranges"]),
            *(prefix["PrefixListId"] for prefix in rule["PrefixListIds"]),
        ]
    }


def test_the_security_group_opens_ssh_alone(account, config):
    [group] = account.describe_security_groups(GroupNames=["biggan"])["SecurityGroups"]
    assert opened(group) == {("tcp", 22, "0.0.0.0/0"), ("-1", None, group["GroupId"])}


def test_a_narrower_group_made_before_is_left_alone(account, described, tmp_path, config):
    vpc = account.describe_vpcs()["Vpcs"][0]["VpcId"]
    group = account.create_security_group(GroupName="narrow", Description="narrow", VpcId=vpc)
    rule = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
    account.authorize_security_group_ingress(
        GroupId=group["GroupId"], IpPermissions=[rule | {"IpRanges": [{"CidrIp": "10.1.0.0/16"}]}]
    )
    described["cluster_name"] = "narrow"
    described["provider"]["security_group"]["GroupName"] = "narrow"
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(described))
    up(path)
    [group] = account.describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    assert opened(group) == {("tcp", 22, "10.1.0.0/16")}


def test_the_workers_gpus_are_looked_up(config):
    spot = config["available_node_types"]["gpu-spot"]
    assert (spot["resources"]["CPU"], spot["resources"]["GPU"]) == (48, 4)
    assert spot["max_workers"] * spot["resources"]["GPU"] == 64


def test_over_ssh_the_head_would_get_token_and_code_and_start_closed(config):
    asked = Ssh.asked
    assert asked["is_head_node"]
    assert any(path.endswith(".ray/auth_token") for path in asked["file_mounts"])
    assert "--dashboard-host=127.0.0.1" in asked["ray_start_commands"][-1]
    assert "RAY_enable_autoscaler_v2" in asked["ray_start_commands"][-1]
    assert any("constraints.txt" in command for command in asked["setup_commands"])
