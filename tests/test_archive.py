import numpy as np
import pytest
import torch

from models.archive import POS_EMBEDDING, Archive
from models.configs import replace
from models.modeling import VisionTransformer
from models.npz import identify, load_npz, save_npz
from tests.conftest import randomise
from tests.layouts import LAYOUTS, arrays_of, big_vision, linen, prefixed


@pytest.fixture(params=["plain", "hybrid"])
def model(request, tiny_config):
    stem = {"patch_size": (1, 1), "resnet": {"num_layers": (1, 1), "width_factor": 0.5}}
    config = replace(tiny_config, **(stem if request.param == "hybrid" else {}))
    return randomise(VisionTransformer(config, 32, 5))


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_gives_the_same_weights_and_is_told(kind, compressed, model, tmp_path):
    change, told = LAYOUTS[kind]
    save_npz(model, tmp_path / "a.npz")
    (np.savez_compressed if compressed else np.savez)(tmp_path / "b.npz", **change(arrays_of(tmp_path / "a.npz")))
    again = load_npz(tmp_path / "b.npz")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    what = identify(tmp_path / "b.npz")
    assert what.config == identify(tmp_path / "a.npz").config and what.num_classes == 5
    assert told in "; ".join(what.repairs) if told else not what.repairs


def test_a_class_token_without_a_position_row_gets_zeros(tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", **big_vision(arrays_of(tmp_path / "a.npz"), class_row=False))
    again = load_npz(tmp_path / "b.npz")
    assert not again.pos_embed[:, 0].any() and torch.equal(again.pos_embed[:, 1:], tiny_model.pos_embed[:, 1:])
    assert "no position row for the class token" in identify(tmp_path / "b.npz").repairs


def test_a_mean_pooled_big_vision_file_needs_no_class_row(tiny_config, tmp_path):
    model = randomise(VisionTransformer(replace(tiny_config, classifier="gap"), 16, 5))
    save_npz(model, tmp_path / "a.npz")
    arrays = linen(arrays_of(tmp_path / "a.npz"))
    arrays["pos_embedding"] = arrays.pop(POS_EMBEDDING)
    np.savez(tmp_path / "b.npz", **prefixed(arrays, "params/"))
    assert torch.equal(load_npz(tmp_path / "b.npz").pos_embed, model.pos_embed)


def test_training_state_may_hold_what_a_model_may_not(tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    arrays = prefixed(arrays_of(tmp_path / "a.npz"), "opt/target/", extra__note=np.array("text"),
                      extra__tree=np.array([{}], dtype=object))
    np.savez(tmp_path / "b.npz", **arrays)
    assert torch.equal(load_npz(tmp_path / "b.npz").cls_token, tiny_model.cls_token)


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "deflated"])
def test_one_changed_bit_is_found(compressed, tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    if compressed:
        np.savez_compressed(tmp_path / "a.npz", **arrays_of(tmp_path / "a.npz"))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    with Archive(tmp_path / "a.npz") as archive:
        info = archive._zip.getinfo("head/kernel.npy")
    content[info.header_offset + 400] ^= 1  # in the values
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="head/kernel.*Fetch or copy it again"):
        load_npz(tmp_path / "a.npz")


def test_opening_reads_no_tensor(tmp_path, tiny_model):
    save_npz(tiny_model, tmp_path / "a.npz")
    with Archive(tmp_path / "a.npz") as archive:
        stored = archive._stored["Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel.npy"]
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[stored.start:stored.start + 4] = b"\xff\xff\xff\xff"  # would fail its checksum if it was looked at
    (tmp_path / "a.npz").write_bytes(content)
    assert identify(tmp_path / "a.npz").config.mlp_dim == 64
