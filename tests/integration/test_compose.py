"""The compose files by the real Docker Compose, and what they name by what is really there."""

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.compose import (
    FIRST,
    OURS,
    ROOT,
    SECOND,
    ask,
    binary,
    config,
    dockerfile,
    image_environment,
    seconds,
)
from support.docs import PAGES, Command, blocks, not_run, parse, text_of
from support.wheels import build_wheel, package_files

from tuneyard.api.main import END_WITHIN_S
from tuneyard.local.yard import PUBLISHED_WITHIN_S
from tuneyard.specs.settings import FILE_SUFFIX, PREFIX, Settings
from tuneyard.workers.supervisor import HELD_TOO_LONG_S

SECOND_IS = {"TUNEYARD_NODE_NAME": "node-2", "TUNEYARD_STORE": "/srv/tuneyard-store"}
SETS: list[tuple[tuple[str, ...], dict[str, str]]] = [
    (FIRST, {}),
    ((*FIRST, "docker-compose.cpu.yml"), {}),
    ((*FIRST, "docker-compose.first-node.yml"), {"TUNEYARD_PRIVATE_ADDRESS": "10.0.0.1"}),
    (FIRST, {"TUNEYARD_STORE_URL": "s3://bucket/prefix"}),
    (SECOND, SECOND_IS),
    (SECOND, SECOND_IS | {"TUNEYARD_STORE": "store", "TUNEYARD_STORE_URL": "s3://bucket/prefix"}),
]
MOUNT = "/run/secrets/"


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    return config(*FIRST)


@pytest.fixture(scope="module")
def second() -> dict[str, Any]:
    return config(*SECOND, **SECOND_IS)


@pytest.mark.parametrize(("files", "env"), SETS)
def test_compose_takes_the_files_and_warns_of_nothing(
    files: tuple[str, ...], env: dict[str, str]
) -> None:
    done = ask(files, "--quiet", env=env)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("services", "api", "depends_on", "nobody"), {"condition": "service_started"}, "nobody"),
        (("services", "api", "secrets"), ["nothing"], "nothing"),
        (("services", "api", "volumes"), ["nowhere:/store"], "nowhere"),
        (("services", "api", "networks"), ["nonet"], "nonet"),
        (("services", "api", "restrat"), "always", "restrat"),
        (("services", "worker", "shm_size"), [8], "shm_size"),
        (("services", "worker", "stop_grace_period"), "long", "long"),
        (("services", "migrate", "command"), {"run": "migrate"}, "command"),
    ],
)
def test_compose_refuses_a_broken_file(
    tmp_path: Path, path: tuple[str, ...], value: object, said: str
) -> None:
    document = yaml.safe_load((ROOT / FIRST[0]).read_text())
    assert ask([_written(tmp_path, document)], "--quiet").returncode == 0
    spot = document
    for name in path[:-1]:
        spot = spot[name]
    spot[path[-1]] = value
    done = ask([_written(tmp_path, document)], "--quiet")
    assert done.returncode != 0
    assert said in done.stderr


def _written(folder: Path, document: object) -> Path:
    """The document in a file; without the merged parts standing in it as anchors."""
    file = folder / "docker-compose.yml"
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[assignment]
    file.write_text(yaml.dump(document, Dumper=dumper))
    return file


def test_every_command_and_health_check_is_one_of_ours(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    for services in (first["services"], second["services"]):
        for name in set(OURS) & set(services):
            command = services[name]["command"]
            assert command[0] == name
            parse(command)
            check = services[name].get("healthcheck")
            if name == "migrate":
                assert check == {"disable": True}
            else:
                assert check["test"] == ["CMD", "tuneyard", "health", name]
                parse(check["test"][2:])


def test_every_setting_that_the_files_name_is_one_of_ours(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    named = {
        name
        for services in (first["services"], second["services"])
        for service in services.values()
        for name in service.get("environment", {})
        if name.startswith(PREFIX)
    }
    for target in ("api", "worker"):
        named |= {name for name in image_environment(target) if name.startswith(PREFIX)}
    ours = {PREFIX + name.upper() for name in Settings.model_fields}
    assert {name.removesuffix(FILE_SUFFIX) for name in named} - ours == set()
    assert len(named) > 10


def test_what_the_environment_may_say_stands_at_the_head_of_its_file() -> None:
    for file in ROOT.glob("docker-compose*.yml"):
        text = file.read_text()
        head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        asked = set(re.findall(r"\$\{(\w+)", text))
        assert {name for name in asked if name not in head} == set(), file.name


def test_secrets_come_by_file_alone_and_each_process_gets_its_own() -> None:
    first = config(*FIRST, TUNEYARD_STORE_URL="s3://bucket/prefix")
    secret = {
        PREFIX + name.upper()
        for name, field in Settings.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }
    used = set()
    for service in first["services"].values():
        environment = service.get("environment", {})
        assert secret & set(environment) == set()
        assert not any("@" in str(value) for value in environment.values())
        granted = {each["source"] for each in service.get("secrets", [])}
        text = f"{environment} {service.get('command')} {service.get('healthcheck')}"
        assert granted == set(re.findall(MOUNT + r"(\w+)", text))
        used |= granted
    assert used == set(first["secrets"])
    owner = [n for n, s in first["services"].items() if "owner_database_url" in str(s)]
    assert owner == ["migrate"]


def test_the_script_makes_every_secret_closed_to_others_and_keeps_what_is_there(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "a folder"
    run = ["sh", str(ROOT / "docker" / "secrets.sh"), str(folder)]
    subprocess.run(run, check=True, capture_output=True)
    made = {file.name: file.read_text() for file in folder.iterdir()}
    for defined in (first["secrets"], second["secrets"]):
        assert {Path(each["file"]).name for each in defined.values()} <= set(made)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o444, 0o644}
    (folder / "store_access_key").write_text("a bucket's")
    made["store_access_key"] = "a bucket's"
    passwords = [text for name, text in made.items() if name.endswith("_password")]
    assert len(set(passwords)) == 5
    assert all(re.fullmatch(r"[\w-]{43}\n", text) for text in passwords)
    printed = subprocess.run([*run, "10.0.0.1"], check=True, capture_output=True, text=True).stdout
    assert {name: (folder / name).read_text() for name in made} == made
    for_nodes = {file.name: file.read_text() for file in (folder / "for-nodes").iterdir()}
    assert set(for_nodes) == set(second["secrets"])
    for name in ("worker_database_url", "broker_url"):
        assert "@10.0.0.1:" in for_nodes[name]
    assert for_nodes["store_access_key"] == "a bucket's"
    assert not any(text.strip() in printed for text in made.values() if text.strip())


def test_the_schema_is_there_before_any_process_of_ours_starts(first: dict[str, Any]) -> None:
    services = first["services"]
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert services["migrate"]["restart"] == "no"
    for name in set(OURS) - {"migrate"}:
        waits = services[name]["depends_on"]
        assert waits["migrate"]["condition"] == "service_completed_successfully"
        # Nothing depends on the broker: jobs run without it.
        assert waits["valkey"]["condition"] == "service_started"


def test_everything_comes_back_has_an_init_and_a_health_check(first: dict[str, Any]) -> None:
    for name, service in first["services"].items():
        assert service["init"] is True
        if name != "migrate":
            assert service["restart"] == "unless-stopped"
            assert service["healthcheck"]["test"]


def test_only_the_api_is_published_on_loopback_unless_asked_otherwise(
    first: dict[str, Any],
) -> None:
    published = {n: s["ports"] for n, s in first["services"].items() if s.get("ports")}
    assert list(published) == ["api"]
    (port,) = published["api"]
    environment = first["services"]["api"]["environment"]
    assert (port["host_ip"], port["published"]) == ("127.0.0.1", "8800")
    assert str(port["target"]) == environment["TUNEYARD_API_PORT"]
    elsewhere = config(*FIRST, TUNEYARD_PUBLISH="10.0.0.1:80")["services"]["api"]["ports"][0]
    assert (elsewhere["host_ip"], elsewhere["published"]) == ("10.0.0.1", "80")


def test_the_database_and_the_broker_stand_in_a_network_without_a_way_out(
    first: dict[str, Any],
) -> None:
    assert first["networks"]["inside"]["internal"] is True
    outside = [n for n, s in first["services"].items() if "outside" in s["networks"]]
    assert sorted(outside) == ["api", "worker"]


def test_every_process_has_the_time_that_it_needs_to_end(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    grace = {n: seconds(s["stop_grace_period"]) for n, s in first["services"].items()}
    runners_s = Settings().stop_grace_s + HELD_TOO_LONG_S + PUBLISHED_WITHIN_S
    assert runners_s < grace["worker"] == 180
    assert grace["worker"] == seconds(second["services"]["worker"]["stop_grace_period"])
    assert min(grace["api"], grace["scheduler"], grace["flower"]) > END_WITHIN_S


def test_a_worker_has_all_gpus_and_the_memory_that_loaders_share(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    for services in (first["services"], second["services"]):
        worker = services["worker"]
        (devices,) = worker["deploy"]["resources"]["reservations"]["devices"]
        assert (devices["driver"], devices["capabilities"]) == ("nvidia", ["gpu"])
        assert int(worker["shm_size"]) == 8 * 1024**3
    services = config(*FIRST, "docker-compose.cpu.yml")["services"]
    assert services["worker"].get("deploy") is None
    assert services["worker"]["shm_size"] == first["services"]["worker"]["shm_size"]


def test_a_second_node_is_a_worker_and_nothing_else_and_needs_a_name(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert list(second["services"]) == ["worker"]
    mine, theirs = (dict(each["services"]["worker"]) for each in (second, first))
    assert mine["environment"].pop("TUNEYARD_NODE_NAME") == "node-2"
    assert theirs["environment"].pop("TUNEYARD_NODE_NAME") == "node-1"
    # Where the API reaches its gateway: within the one network there, on a published port here.
    assert mine["environment"].pop("TUNEYARD_GATEWAY_URL") == "http://127.0.0.1:8801"
    assert theirs["environment"].pop("TUNEYARD_GATEWAY_URL") == "http://worker:8801"
    assert [port["published"] for port in mine["ports"]] == ["8801"]
    for name in ("command", "environment", "secrets", "build", "image", "init", "healthcheck"):
        assert mine[name] == theirs[name]
    assert not mine.get("depends_on")
    for missing, said in (
        ("TUNEYARD_NODE_NAME", "a name that no other machine has"),
        ("TUNEYARD_STORE", "the folder where the store of all machines is mounted"),
    ):
        env = {name: value for name, value in SECOND_IS.items() if name != missing}
        refused = ask(SECOND, "--quiet", env=env)
        assert refused.returncode != 0
        assert said in refused.stderr


def test_what_is_reached_by_other_machines_is_bound_to_the_private_address() -> None:
    files = (*FIRST, "docker-compose.first-node.yml")
    services = config(*files, TUNEYARD_PRIVATE_ADDRESS="10.0.0.1")["services"]
    for name, port in (("postgres", "5432"), ("valkey", "6379")):
        assert [(p["host_ip"], p["published"]) for p in services[name]["ports"]] == [
            ("10.0.0.1", port)
        ]
    assert ask(files, "--quiet").returncode != 0


def test_the_store_is_a_volume_or_one_folder_for_all_or_a_bucket(first: dict[str, Any]) -> None:
    def store(services: dict[str, Any], name: str) -> tuple[str, str, str, str]:
        (mounted,) = (v for v in services[name]["volumes"] if v["target"] == "/store")
        given = services[name]["environment"]
        url, key = given["TUNEYARD_STORE_URL"], given["TUNEYARD_STORE_ACCESS_KEY_FILE"]
        return mounted["type"], mounted["source"], url, key

    folder, url = "/srv/tuneyard-store", "s3://bucket/prefix"
    for name in ("api", "worker"):
        shared = config(*FIRST, TUNEYARD_STORE=folder)["services"]
        bucket = config(*FIRST, TUNEYARD_STORE_URL=url)["services"]
        assert store(first["services"], name) == ("volume", "store", "/store", "")
        assert store(shared, name) == ("bind", folder, "/store", "")
        assert store(bucket, name) == ("volume", "store", url, f"{MOUNT}store_access_key")
    second = config(*SECOND, **SECOND_IS)["services"]
    assert store(second, "worker") == ("bind", folder, "/store", "")


# The images --------------------------------------------------------------------------------------


def test_the_images_start_what_is_there_as_nobody_in_particular() -> None:
    stages = dockerfile()
    for target in ("api", "worker"):
        stage = stages[target]
        assert stage.words("ENTRYPOINT") == ["tuneyard"]
        parse(stage.words("CMD"))
        health = stage.words("HEALTHCHECK")
        assert health[0] == "tuneyard"
        parse(health[1:])
        assert stage.all("USER") == ["10001:10001"]


def test_compose_builds_targets_that_are_there_and_each_image_once(first: dict[str, Any]) -> None:
    services = first["services"]
    built = {s["image"]: s["build"]["target"] for s in services.values() if "build" in s}
    assert built == {"tuneyard-api": "api", "tuneyard-worker": "worker"}
    assert set(built.values()) <= set(dockerfile())
    assert {services[name]["image"] for name in OURS} == set(built)
    assert sum("build" in s for s in services.values()) == len(built)


def test_torch_is_installed_for_runners_alone_and_every_extra_is_known() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = {
        name: [run for run in stage.all("RUN") if "--constraint /wheel/constraints.txt" in run]
        for name, stage in dockerfile().items()
    }
    extras = {
        name: [re.search(r"\[([\w,]+)\]", run)[1].split(",") for run in runs]  # type: ignore[index]
        for name, runs in installs.items()
        if runs
    }
    assert extras == {
        "api-packages": [["api", "flower", "s3", "worker"]],
        "worker-packages": [["s3", "worker"], ["metrics", "runner"]],
    }
    assert {extra for runs in extras.values() for each in runs for extra in each} <= set(known)
    runners_install = installs["worker-packages"][1]
    assert "/opt/runner/bin/python" in runners_install
    assert "${TORCH}" in runners_install
    assert image_environment("worker")["TUNEYARD_RUNNER_PYTHON"] == "/opt/runner/bin/python"
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned is not None
    assert dockerfile()["worker-packages"].all("ARG") == [f"TORCH=torch=={pinned[1]}"]


def test_the_wheel_of_the_images_holds_every_file_of_the_package(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("tuneyard/")}
    assert packed == package_files()
    assert "tuneyard/workers/guard.py" in packed
    assert any(name.startswith("tuneyard/migrations/versions/") for name in packed)


# The how-tos -------------------------------------------------------------------------------------


COMPOSED = [c for c in not_run() if c.words[:2] == ("docker", "compose")]
IN_DOCKER = [c for c in not_run() if c.words[:2] == ("docker", "run")]


@pytest.mark.parametrize("command", COMPOSED, ids=lambda command: command.line)
def test_a_line_of_the_docs_is_one_that_compose_takes(command: Command) -> None:
    """Its files, its variables, its subcommand, options and services; its command of ours."""
    words, files = list(command.words[2:]), list[str]()
    while words[0] == "-f":
        files, words = [*files, words[1]], words[2:]
    env = {name: value for name, value in command.env.items() if name.startswith(PREFIX)}
    services = set(config(*(files or FIRST), **env)["services"])
    verb, rest = words[0], words[1:]
    options = [word for word in rest[: _command_at(verb, rest)] if word.startswith("-")]
    shown = subprocess.run(
        [str(binary()), verb, "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert f"docker compose {verb}" in shown
    for option in options:
        assert re.search(rf"(^|\s){option.partition('=')[0]}\b", shown), option
    named = rest[len(options) :]
    if verb in ("run", "exec"):
        assert named[0] in services
        named = named[1:]
        if named[0] in ("keys", "tuneyard"):
            parse(named[named[0] == "tuneyard" :])
    else:
        assert set(named) <= services


def _command_at(verb: str, words: list[str]) -> int:
    """Where the service is named: what stands behind it is not Compose's."""
    if verb not in ("run", "exec"):
        return len(words)
    return next(number for number, word in enumerate(words) if not word.startswith("-"))


def test_what_the_docs_run_in_docker_names_an_image_and_a_volume_of_compose(
    first: dict[str, Any],
) -> None:
    images = {service["image"] for service in first["services"].values()}
    volumes = {volume["name"] for volume in first["volumes"].values()}
    assert len(COMPOSED) > 12
    assert len(IN_DOCKER) == 1
    for command in IN_DOCKER:
        assert images & set(command.words)
        mounted = [word.partition(":")[0] for word in command.words if ":/" in word]
        assert {name for name in mounted if not name.startswith("/")} <= volumes


def test_the_override_of_the_how_to_is_one_that_compose_takes(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("docs/howto/servers.md") if block.language == "yaml")
    override = tmp_path / "docker-compose.override.yml"
    override.write_text(block.text)
    worker = config(*FIRST, override)["services"]["worker"]
    assert worker["environment"]["HF_TOKEN_PATH"] == "/run/secrets/hf_token"
    assert "TUNEYARD_HUB_ORDER" in {PREFIX + name.upper() for name in Settings.model_fields} & set(
        worker["environment"]
    )
    assert {"hf_token", "broker_url"} <= {each["source"] for each in worker["secrets"]}


def test_the_files_of_compose_that_the_docs_name_are_there() -> None:
    named = {
        name
        for page in PAGES
        for name in re.findall(r"docker[\w-]*[./][\w.-]*\.(?:yml|sh)", text_of(page))
    }
    assert len(named) > 4
    made = {"docker-compose.override.yml"}
    assert {name for name in named - made if not (ROOT / name).is_file()} == set()
