"""What a run starts from, where no checkpoint decides it: sizes by hand, and a model that is only to be looked at."""

import pytest

from models import exchange
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from utils.opening import bare_model, choose_model, resized
from utils.settings import parse


def scratch(*flags):
    return choose_model(parse(["--pretrained_dir", "none", *map(str, flags)]))


def test_sizes_by_hand_are_those_of_the_model():
    config, size, weights = scratch("--model_type", "ViT-CIFAR", "--patch_size", 2, "--hidden_size", 48, "--num_layers",
                                    3, "--num_heads", 4, "--pos_embed", "sincos2d", "--patch_proj", "linear",
                                    "--drop_path", 0.2)
    assert (config.patch_size, config.hidden_size, config.num_layers, config.num_heads) == ((2, 2), 48, 3, 4)
    assert (config.mlp_dim, config.pos_embed, config.patch_proj) == (192, "sincos2d", "linear")
    assert (config.drop_path_rate, config.name, size, weights) == (0.2, "custom", (32, 32), None)
    assert scratch("--hidden_size", 96, "--num_heads", 3, "--mlp_dim", 100)[0].mlp_dim == 100


def test_a_published_structure_keeps_its_name():
    assert scratch("--num_heads", 12)[0].name == "ViT-B_16"
    large = scratch("--model_type", "ViT-B_16", "--hidden_size", 1024, "--num_layers", 24, "--num_heads", 16)[0]
    assert (large.name, large.mlp_dim) == ("ViT-L_16", 4096)
    assert scratch("--pos_embed", "none")[0].name == "ViT-B_16"


@pytest.mark.parametrize("name, size", [("ViT-demo", 32), ("ViT-CIFAR", 32), ("ViT-B_8", 224), ("R50+ViT-B_16", 224)])
def test_small_patches_are_for_small_images(name, size):
    assert scratch("--model_type", name)[1] == (size, size)


def test_a_small_model_stays_for_small_images_whatever_its_patches(tmp_path, monkeypatch):
    assert scratch("--model_type", "ViT-CIFAR", "--patch_size", 8)[1] == (32, 32)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="nobody has published weights of ViT-CIFAR: train it from scratch"):
        choose_model(parse(["--model_type", "ViT-CIFAR"]))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="5 heads cannot share a width of 768"):
        resized(CONFIGS["ViT-B_16"], parse(["--num_heads", "5"]))


def test_a_checkpoint_decides_its_sizes(tmp_path, tiny_model):
    from models.npz import save_npz
    save_npz(tiny_model, tmp_path / "tiny.npz")
    flags = ["--pretrained_dir", str(tmp_path / "tiny.npz")]
    with pytest.raises(ValueError, match="--num_layers, --pos_embed: a checkpoint decides that"):
        choose_model(parse([*flags, "--num_layers", "3", "--pos_embed", "none"]))
    config, size, _ = choose_model(parse([*flags, "--patch_proj", "linear"]))
    assert (config.patch_proj, config.num_layers, size) == ("linear", 2, (16, 16))
    deep = VisionTransformer(replace(tiny_model.config, drop_path_rate=0.4), 16, 5)
    exchange.save(deep, tmp_path / "a.safetensors", {})
    flags = ["--pretrained_dir", str(tmp_path / "a.safetensors")]
    assert choose_model(parse(flags))[0].drop_path_rate == 0.0  # of how the weights were made
    assert choose_model(parse([*flags, "--drop_path", "0.2"]))[0].drop_path_rate == 0.2


@pytest.mark.parametrize("flags, parameters", [
    # Of the published sizes, Dosovitskiy et al. 2021, Table 1 (86, 307 and 632 M), with heads of 10 classes
    (["--model", "base"], 85_806_346), (["--model", "large"], 303_311_882), (["--model", "huge"], 630_777_610),
    (["--model_type", "ViT-L_32"], 305_520_650)])
def test_a_model_to_look_at_takes_no_memory_and_no_file(flags, parameters):
    from utils.settings import given
    model = bare_model(given(flags))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.pos_embed.is_meta and model.num_classes == 10


def test_a_model_to_look_at_is_that_of_a_checkpoint_where_there_is_one(tmp_path, tiny_model):
    from models.npz import save_npz
    save_npz(tiny_model, tmp_path / "tiny.npz")
    model = bare_model({"pretrained_dir": str(tmp_path / "tiny.npz"), "dataset": "photos", "train": "last:1"})
    assert (model.num_classes, model.config.hidden_size, model.img_size) == (5, 32, (16, 16))
    assert sum(p.requires_grad for p in model.parameters()) == 12 + 2 + 2  # a block, the norm and the head


@pytest.mark.parametrize("flags, words", [
    (["--resume", "output/run"], "leave --resume out"),
    (["--hidden_size", "48"], "--hidden_size: a checkpoint decides"),
    (["--pretrained_dir", "typo.safetensors"], "typo.safetensors")])
def test_a_summary_shows_no_model_that_would_not_be_trained(flags, words):
    from utils.settings import given
    with pytest.raises((ValueError, OSError), match=words):
        bare_model(given(flags))
