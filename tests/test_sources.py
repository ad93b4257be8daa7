import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

from models import sources
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from models.npz import load_npz, save_npz
from tests.conftest import randomise
from tests.test_exchange import transformers_names

NAME = "imagenet21k/ViT-tiny"


class Server:
    """A loopback server: `routes` has for each path (status, body, Content-Length or None), or "silence"."""

    def __init__(self):
        self.routes, self.asked, self.end = {}, [], threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                route = server.routes.get(self.path, (404, b"not here", None))
                if route == "silence":
                    server.end.wait(10)
                    return
                status, body, length = route
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.send_header("ETag", '"0123"')           # these two are what the hub's library asks for
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)
            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self):
        self.end.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch):
    server = Server()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(sources, "BUCKET", f"{server.address}/bucket")
    monkeypatch.setattr(sources, "HUB", f"{server.address}/hub")
    yield server
    server.close()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A model as Google would publish it for 224 px, in place of the real tables; no copies unless a test adds some."""
    config = replace(CONFIGS["ViT-demo"], name="ViT-tiny", patch_size=(16, 16), hidden_size=32, mlp_dim=64, num_heads=2,
                     num_layers=2)
    model = randomise(VisionTransformer(replace(config, representation_size=32), 224, 5))
    save_npz(model, tmp_path / "published.npz")
    monkeypatch.setitem(CONFIGS, "ViT-tiny", config)
    monkeypatch.setitem(sources.SIZES, NAME, (tmp_path / "published.npz").stat().st_size / 2**20)
    return model


@pytest.fixture
def target(tmp_path):
    return tmp_path / "checkpoint" / "ViT-tiny.npz"


@pytest.fixture
def hub(monkeypatch, tmp_path, server):
    """(repository, tensors) -> the file is on the loopback hub, and is among the copies of the same weights."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def add(repository, tensors=None):
        monkeypatch.setitem(sources.SAME_WEIGHTS, NAME, (*sources.SAME_WEIGHTS.get(NAME, ()), repository))
        if tensors is not None:
            save_file(tensors, tmp_path / "model.safetensors")
            body = (tmp_path / "model.safetensors").read_bytes()
            server.routes[f"/hub/{repository}/resolve/main/model.safetensors"] = (200, body, None)
    return add


def body(tmp_path):
    return (tmp_path / "published.npz").read_bytes()


def nothing_left(target):
    return not target.parent.exists() or not list(target.parent.iterdir())


# --- The bucket ------------------------------------------------------------------------------------------------------

def test_a_published_file_is_fetched_from_the_bucket_byte_for_byte(server, published, target, tmp_path):
    server.routes[f"/bucket/{NAME}.npz"] = (200, body(tmp_path), None)
    assert sources.fetch(target) == target and target.read_bytes() == body(tmp_path)
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_is_there_is_not_touched_and_nobody_is_asked(server, published, target):
    target.parent.mkdir()
    target.write_bytes(b"mine")
    assert sources.fetch(str(target)) == target
    assert target.read_bytes() == b"mine" and not server.asked


@pytest.mark.parametrize("answer, message", [
    ((403, b"", None), r"answered 403 \(forbidden\)"),
    ((404, b"", None), r"answered 404 \(no such file\)"),
    ((500, b"", None), r"answered 500"),
    ("silence", r"no answer within 0.3 s"),
    ((200, b"<html>", None), r"has 0.00 MiB, and the published file 0\.\d\d MiB"),
])
def test_what_the_bucket_answered_is_said_with_the_address_and_what_to_do(server, published, target, monkeypatch,
                                                                          answer, message):
    monkeypatch.setattr(sources, "TIMEOUT", 0.3)
    server.routes[f"/bucket/{NAME}.npz"] = answer
    with pytest.raises(FileNotFoundError, match=message) as error:
        sources.fetch(target)
    assert f"{server.address}/bucket/{NAME}.npz: " in str(error.value)
    assert f"Put it by hand at {target}" in str(error.value)
    assert nothing_left(target)


def test_a_body_that_is_cut_off_is_thrown_away(server, published, target, tmp_path):
    whole = body(tmp_path)
    server.routes[f"/bucket/{NAME}.npz"] = (200, whole[:5000], len(whole))
    with pytest.raises(FileNotFoundError, match=rf"cut off after 5,000 of {len(whole):,} bytes"):
        sources.fetch(target)
    assert nothing_left(target)


def test_a_refused_connection_is_said(server, published, target, monkeypatch):
    closed = Server()
    closed.close()
    monkeypatch.setattr(sources, "BUCKET", closed.address)
    with pytest.raises(FileNotFoundError, match=rf"{closed.address}/{NAME}.npz: .*refused"):
        sources.fetch(target)


@pytest.mark.parametrize("change, size, message", [
    ({"num_layers": 1}, 224, r"num_layers 1 instead of 2"),
    ({}, 384, r"belongs to images of 384 x 384 px, and imagenet21k/ViT-tiny to 224"),
])
def test_a_file_that_is_not_what_its_name_says_is_thrown_away(server, published, target, tmp_path, monkeypatch,
                                                              change, size, message):
    config = replace(CONFIGS["ViT-tiny"], **change)
    save_npz(randomise(VisionTransformer(config, size, 5)), tmp_path / "other.npz")
    monkeypatch.setitem(sources.SIZES, NAME, (tmp_path / "other.npz").stat().st_size / 2**20)
    server.routes[f"/bucket/{NAME}.npz"] = (200, (tmp_path / "other.npz").read_bytes(), None)
    with pytest.raises(FileNotFoundError, match=message):
        sources.fetch(target)
    assert nothing_left(target)


# --- The hub ---------------------------------------------------------------------------------------------------------

def test_a_copy_from_the_hub_is_kept_as_npz_and_what_it_lacks_is_said(server, published, target, hub, caplog):
    server.routes[f"/bucket/{NAME}.npz"] = (403, b"", None)
    tensors = published.state_dict()
    tensors = {key: tensors[key] for key in tensors if not key.startswith(("head", "pre_logits"))}
    hub("timm/vit_tiny.orig_in21k", tensors)
    with caplog.at_level(logging.INFO):
        sources.fetch(target)
    assert ("converted from timm/vit_tiny.orig_in21k, whose file lacks the head (all zero in Google's file) and "
            "pre_logits (which fine-tuning drops).") in caplog.text
    start = load_npz(target, num_classes=7)
    assert start.num_classes == 7 and not start.head.weight.any()
    assert all(torch.equal(start.state_dict()[key], value) for key, value in tensors.items())
    assert load_npz(target).num_classes == 0 and list(target.parent.iterdir()) == [target]


def test_googles_own_repository_has_pre_logits_and_comes_after_timms(server, published, target, hub):
    hub("timm/vit_tiny.orig_in21k")
    headless = VisionTransformer(published.config, 224, 0)
    headless.load_state_dict({key: value for key, value in published.state_dict().items() if "head" not in key})
    hub("google/vit-tiny-in21k", transformers_names(headless))
    sources.fetch(target)
    model = load_npz(target)
    assert torch.equal(model.pre_logits.fc.weight, published.pre_logits.fc.weight)
    assert model.config.gelu == "tanh" and model.config.norm_eps == 1e-6
    asked = [path for path in server.asked if path.endswith((".npz", ".safetensors"))]
    assert list(dict.fromkeys(asked)) == [
        f"/bucket/{NAME}.npz", "/hub/timm/vit_tiny.orig_in21k/resolve/main/model.safetensors",
        "/hub/google/vit-tiny-in21k/resolve/main/model.safetensors"]


def test_a_copy_of_another_architecture_is_not_kept(server, published, target, hub):
    other = randomise(VisionTransformer(replace(CONFIGS["ViT-tiny"], num_layers=1), 224, 5))
    hub("timm/vit_tiny.orig_in21k", other.state_dict())
    with pytest.raises(FileNotFoundError, match=r"hub/timm/vit_tiny.orig_in21k: .*num_layers 1 instead of 2"):
        sources.fetch(target)
    assert nothing_left(target)


def test_each_address_and_its_answer_is_listed_when_all_fail(server, published, target, hub, monkeypatch):
    server.routes[f"/bucket/{NAME}.npz"] = (403, b"", None)
    hub("timm/vit_tiny.orig_in21k")
    with pytest.raises(FileNotFoundError) as error:
        sources.fetch(target)
    assert str(error.value).splitlines()[1:3] == [
        f"  {server.address}/bucket/{NAME}.npz: answered 403 (forbidden)",
        f"  {server.address}/hub/timm/vit_tiny.orig_in21k: answered 404 (no such file)"]

    closed = Server()
    closed.close()
    monkeypatch.setattr(sources, "HUB", closed.address)
    with pytest.raises(FileNotFoundError, match=rf"{closed.address}/timm/vit_tiny.orig_in21k: .*refused"):
        sources.fetch(target)
    assert nothing_left(target)


# --- Names -----------------------------------------------------------------------------------------------------------

def test_an_unknown_name_is_refused_with_the_nearest_published_ones(server, tmp_path):
    with pytest.raises(ValueError, match=r"There is no file .*ViT-B16.npz, and Google published no "
                                         r"imagenet21k/ViT-B16.npz.*nearest(.|\n)*\n  imagenet21k/ViT-B_16\n"):
        sources.fetch(tmp_path / "ViT-B16.npz")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        sources.fetch(tmp_path / "model.safetensors")
    assert not server.asked


@pytest.mark.parametrize("short", ["augreg/B_16.npz", "augreg/ViT-B_16.npz", "B_16.npz"])
def test_a_short_augreg_name_is_refused_with_the_candidates(server, tmp_path, short):
    with pytest.raises(ValueError, match="ask for one by its whole name") as error:
        sources.fetch(tmp_path / short)
    names = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(names) > 3 and all(name.startswith("augreg/B_16-") for name in names) and not server.asked


def test_a_typo_finds_the_file_that_lies_beside(tmp_path):
    (tmp_path / "ViT-demo.npz").write_bytes(b"x")
    for name in ("ViT_demo.npz", "Vit-demo.npz", "ViT-dem.npz"):
        with pytest.raises(FileNotFoundError, match=r"Did you mean .*ViT-demo\.npz\?$"):
            sources.fetch(tmp_path / name)
