import pytest
import torch
from safetensors.torch import save_file

from models import exchange
from models.exchange import load, save
from models.modeling import VisionTransformer
from models.npz import save_npz
from tests.conftest import randomise
from tests.test_exchange import transformers_names, vit_pytorch_names


def test_a_file_of_each_layout_is_identified(tiny_model, tiny_config, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    save(tiny_model, tmp_path / "a.safetensors", {})
    save_file(tiny_model.state_dict(), tmp_path / "b.safetensors")
    torch.save({"model": vit_pytorch_names(tiny_model)}, tmp_path / "b.bin")
    save_file(transformers_names(tiny_model), tmp_path / "c.safetensors")
    layouts = {"a.npz": "Google's .npz", "a.safetensors": "ours", "b.safetensors": "timm", "b.bin": "ViT-pytorch",
               "c.safetensors": "transformers"}
    for name, layout in layouts.items():
        what = exchange.identify(tmp_path / name, config=tiny_config)
        assert (what.path, what.layout, what.grid, what.img_size) == (tmp_path / name, layout, (4, 4), (16, 16))
        assert (what.num_classes, what.dtype) == (5, "float32") and what.config.num_heads == 2
        assert what.parameters == sum(p.numel() for p in tiny_model.parameters())
        assert what.size == (tmp_path / name).stat().st_size and what.family is None and what.candidates == ()
        assert what.repairs == (("nested under 'model'",) if name == "b.bin" else ())


def test_types_and_a_missing_head_are_identified(tiny_model, tiny_config, tmp_path):
    state = {name: value.half() for name, value in tiny_model.state_dict().items() if not name.startswith("head")}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({**state, "norm.bias": state["norm.bias"].float()}, tmp_path / "a.pth")
    what = exchange.identify(tmp_path / "a.safetensors", tiny_config)
    assert (what.dtype, what.num_classes) == ("float16", 0)
    assert exchange.identify(tmp_path / "a.pth", tiny_config).dtype == "mixed"


def test_a_grid_that_is_not_square_and_not_told_is_none(tiny_config, tmp_path):
    model = randomise(VisionTransformer(tiny_config, (16, 20), 5))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    what = exchange.identify(tmp_path / "a.safetensors", tiny_config)
    assert what.grid is None and what.img_size is None
    with pytest.raises(ValueError, match="20 positions are no square grid"):
        exchange.describe(tmp_path / "a.safetensors", tiny_config)
    config, size = exchange.describe(tmp_path / "a.safetensors", tiny_config, img_size=(16, 20))
    assert size == (16, 20) and config.num_heads == 2


def test_a_description_is_the_configuration_and_size_that_loading_gives(tiny_model, tiny_config, tmp_path):
    save(tiny_model, tmp_path / "a.safetensors", {})
    save(randomise(VisionTransformer(tiny_config, (17, 34), 5)), tmp_path / "b.safetensors", {})
    save_npz(load(tmp_path / "b.safetensors"), tmp_path / "b.npz")
    for name, size in (("a.safetensors", (16, 16)), ("b.safetensors", (17, 34)), ("b.npz", (16, 32))):
        model = load(tmp_path / name)
        assert exchange.describe(tmp_path / name) == (model.config, model.img_size) and model.img_size == size
    with pytest.raises(ValueError, match=r"not ViT-B_16: .*hidden_size 32 instead of 768"):
        exchange.describe(tmp_path / "a.safetensors", "ViT-B_16")


def test_what_was_asked_for_and_is_not_there_is_refused(tiny_model, tmp_path):
    save_npz(tiny_model, tmp_path / "a.npz")
    save(tiny_model, tmp_path / "a.safetensors", {})
    for name in ("a.npz", "a.safetensors"):
        with pytest.raises(ValueError, match=r"holds another model, not ViT-B_16: .*hidden_size 32 instead of 768"):
            exchange.identify(tmp_path / name, "ViT-B_16")


def test_conventions_that_nobody_recorded_are_told_and_stay_told(tiny_model, tiny_config, tmp_path):
    save_file(tiny_model.state_dict(), tmp_path / "bare.safetensors")
    what = exchange.identify(tmp_path / "bare.safetensors", tiny_config)
    assert what.assumed == ("gelu", "norm_eps", "mean", "std")
    save(tiny_model, tmp_path / "ours.safetensors", {"assumed": what.assumed})
    assert exchange.identify(tmp_path / "ours.safetensors").assumed == what.assumed
    save_npz(tiny_model, tmp_path / "a.npz")
    assert exchange.identify(tmp_path / "a.npz").assumed == ()
