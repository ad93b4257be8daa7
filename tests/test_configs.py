import json
from pathlib import Path

import pytest
import torch

from models.configs import CONFIGS, get_config, replace
from models.exchange import config_in
from models.modeling import VisionTransformer
from models.npz import named

COUNTS = json.loads((Path(__file__).parent / "oracle" / "parameter_counts.json").read_text())


def parameters(config, classes, size=224):
    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(config, size, classes).parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_those_of_google(name):
    config = get_config(name.removesuffix("-gap-norep"))
    config = replace(config, classifier="gap") if name.endswith("-gap-norep") else config
    with_pre_logits = replace(config, representation_size=config.hidden_size)
    assert parameters(config, 0) == COUNTS[name]["no_head"]
    assert parameters(config, 1000) == COUNTS[name]["head_1000"]
    assert parameters(with_pre_logits, 21843) == COUNTS[name]["head_21843_with_pre_logits_hidden"]


def test_every_configuration_has_a_known_parameter_count():
    assert set(CONFIGS) - set(COUNTS) == {"ViT-demo", "ViT-CIFAR"}
    assert parameters(CONFIGS["ViT-demo"], 0, 32) == 2_691_648
    D, M = 192, 768  # the patches' kernel, 64 + 1 places and a class token, 12 blocks, the last norm
    block = 4 * (D * D + D) + 2 * D * M + M + D + 4 * D
    assert parameters(CONFIGS["ViT-CIFAR"], 0, 32) == (48 * D + D) + 66 * D + 12 * block + 2 * D


def test_no_two_configurations_have_one_structure():
    """A file's structure names it."""
    assert all(named(config).name == name for name, config in CONFIGS.items())


def test_published_dropout_is_a_tenth_for_four_and_none_elsewhere():
    rates = {name: config.dropout_rate for name, config in CONFIGS.items() if config.dropout_rate}
    assert rates == dict.fromkeys(("ViT-L_16", "ViT-H_14", "R50+ViT-B_16", "R50+ViT-L_32"), 0.1)
    assert {config.attention_dropout_rate for config in CONFIGS.values()} == {0.0}
    assert {config.drop_path_rate for config in CONFIGS.values()} == {0.0}


@pytest.mark.parametrize("spelling, name", [("R50-ViT-B_16", "R50+ViT-B_16"), ("ViT-B_16-224", "ViT-B_16"),
                                            ("R50-ViT-B_16-384", "R50+ViT-B_16"), ("ViT-H_14", "ViT-H_14")])
def test_other_spellings_are_accepted(spelling, name):
    assert get_config(spelling).name == name


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no model 'ViT-X_16'.*ViT-B_16"):
        get_config("ViT-X_16")


def test_replace_refuses_a_field_that_does_not_exist():
    assert replace(CONFIGS["ViT-B_16"], gelu="erf").gelu == "erf"
    with pytest.raises(KeyError, match="drop_out"):
        replace(CONFIGS["ViT-B_16"], drop_out=0.1)


def test_a_record_from_before_a_field_existed_means_its_default():
    config = replace(CONFIGS["ViT-S_16"], dropout_rate=0.1)
    old = {key: value for key, value in config.to_dict().items()
           if key not in ("pos_embed", "patch_proj", "drop_path_rate")}
    assert config_in({"config": json.loads(json.dumps(old))}) == config


@pytest.mark.parametrize("field, value, said", [
    ("pos_embed", "sincos", r"has pos_embed 'sincos': choose learned, sincos1d, sincos2d, none\.$"),
    ("patch_proj", "Conv", r"has patch_proj 'Conv': choose conv, linear\.$"),
    ("drop_path_rate", 1.0, r"has drop_path_rate 1.0: give at least 0 and less than 1\.$"),
    ("drop_path_rate", -0.1, "has drop_path_rate -0.1: give at least 0"),
    ("drop_path_rate", float("nan"), "has drop_path_rate nan: give at least 0")])
def test_unknown_words_and_rates_are_refused_where_a_model_is_built(field, value, said):
    with pytest.raises(ValueError, match=said), torch.device("meta"):
        VisionTransformer(replace(CONFIGS["ViT-demo"], **{field: value}), 32, 2)
