"""What of the worker's access to the hubs reaches a download's runner, and what never does."""

import pytest

from tuneyard.specs.settings import Settings
from tuneyard.workers.hub_access import hub_environment, hub_order, places


def test_mirrors_and_limits_pass_and_tokens_become_files(tmp_path):
    environ = {
        "HF_ENDPOINT": "http://mirror",
        "MODELSCOPE_ENDPOINT": "http://ours",
        "MODELSCOPE_DOWNLOAD_TIMEOUT": "5",
        "https_proxy": "http://proxy",
        "HF_TOKEN": "hf_secret",
        "MODELSCOPE_API_TOKEN": "ms_secret",
        "HF_HOME": "/their/own",
        "HF_HUB_OFFLINE": "1",
        "AWS_SECRET_ACCESS_KEY": "no",
        "TUNEYARD_DATABASE_URL": "no",
    }
    passed = hub_environment(environ, tmp_path)
    token_files = {"HF_TOKEN_PATH": "hf_secret", "MODELSCOPE_API_TOKEN_FILE": "ms_secret"}
    assert passed == {
        "HF_ENDPOINT": "http://mirror",
        "MODELSCOPE_ENDPOINT": "http://ours",
        "MODELSCOPE_DOWNLOAD_TIMEOUT": "5",
        "https_proxy": "http://proxy",
        "HF_HUB_OFFLINE": "0",
        **{name: passed[name] for name in token_files},
    }
    for name, token in token_files.items():
        file = tmp_path / "tokens" / name.lower()
        assert (passed[name], file.read_text()) == (str(file), token)
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700


def test_a_token_that_is_a_file_stays_where_it_is(tmp_path):
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "token").write_text("from `hf auth login`")
    login = hub_environment({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "home")
    assert login["HF_TOKEN_PATH"] == str(tmp_path / "huggingface" / "token")
    for name in ("HF_TOKEN_PATH", "HF_TOKEN_FILE"):
        assert hub_environment({name: "/run/secrets/hf"}, tmp_path)["HF_TOKEN_PATH"] == (
            "/run/secrets/hf"
        )
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("said", "order"),
    [
        (None, ["modelscope", "huggingface"]),
        ("1", ["modelscope", "huggingface"]),
        ("0", ["huggingface", "modelscope"]),
    ],
)
def test_llama_factorys_variable_says_which_hub_comes_first(tmp_path, said, order):
    environ = {} if said is None else {"USE_MODELSCOPE_HUB": said}
    assert hub_order(Settings(home=tmp_path), environ) == order


def test_the_clients_caches_of_this_account_are_looked_through(tmp_path):
    for name in ("huggingface", "modelscope"):
        (tmp_path / ".cache" / name).mkdir(parents=True)
    (tmp_path / "cache").mkdir()
    (tmp_path / "store").mkdir()
    settings = Settings(home=tmp_path, node_roots="/mnt/models")
    found = places(settings, {"HOME": str(tmp_path)})
    assert found["caches"] == [str(tmp_path / ".cache" / n) for n in ("huggingface", "modelscope")]
    assert found["copied"] is True
    assert found["node_roots"] == ["/mnt/models"]
