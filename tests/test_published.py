from pathlib import Path

import pytest
import torch

from models import published
from models.configs import CONFIGS, replace
from models.modeling import VisionTransformer
from models.published import families

AUGREG = "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0--imagenet2012-steps_20k-lr_0.03-res_384"


@pytest.mark.parametrize("path, name, model, size", [
    ("checkpoint/ViT-B_16.npz", "imagenet21k/ViT-B_16", "ViT-B_16", 224),
    ("checkpoint/imagenet21k+imagenet2012/ViT-B_16-224.npz", "imagenet21k+imagenet2012/ViT-B_16-224", "ViT-B_16", 224),
    ("checkpoint/imagenet21k+imagenet2012/ViT-L_32.npz", "imagenet21k+imagenet2012/ViT-L_32", "ViT-L_32", 384),
    ("checkpoint/R50-ViT-B_16.npz", "imagenet21k/R50+ViT-B_16", "R50+ViT-B_16", 224),
    (f"checkpoint/augreg/{AUGREG}.npz", f"augreg/{AUGREG}", "ViT-Ti_16", 384),
    (f"{AUGREG}.npz", f"augreg/{AUGREG}", "ViT-Ti_16", 384),
])
def test_a_path_names_one_published_file(path, name, model, size):
    assert published.published_name(Path(path)) == name
    assert published.model_name(name) == model and published.image_size(name) == size


@pytest.mark.parametrize("name, model, size, classes, pre_logits, family, candidates", [
    ("x.npz", "ViT-B_16", 224, 21843, True, "imagenet21k", ""),
    ("x.npz", "ViT-B_16", 224, 21843, False, "augreg", ""),
    ("x.npz", "R50+ViT-L_32", 224, 21843, False, None, "imagenet21k augreg"),
    ("x.npz", "ViT-B_16", 384, 1000, False, None, "imagenet21k+imagenet2012 augreg"),
    ("x.npz", "ViT-B_16", 224, 1000, False, None, "imagenet21k+imagenet2012 augreg sam"),
    ("sam/ViT-B_16.npz", "ViT-B_16", 224, 1000, False, "sam", ""),
    ("ViT-B_16-224.npz", "ViT-B_16", 224, 1000, False, "imagenet21k+imagenet2012", ""),
    ("ViT-B_16.npz", "ViT-B_16", 224, 1000, False, None, "imagenet21k+imagenet2012 augreg sam"),  # in three folders
    (f"{AUGREG}.npz", "ViT-Ti_16", 384, 1000, False, "augreg", ""),
    (f"{AUGREG}.npz", "ViT-B_16", 224, 21843, True, "imagenet21k", ""),  # a name that the shapes contradict is no proof
    ("ViT-B_16-gap-norep.npz", "ViT-B_16-gap-norep", 224, 1000, False, "gsam", ""),
    ("my_thousand_birds.npz", "ViT-Ti_16", 224, 1000, False, None, "augreg"),
    ("x.npz", "ViT-H_14", 224, 21843, True, "imagenet21k", ""), ("x.npz", "ViT-B_16", 224, 12, False, None, ""),
    ("x.npz", "custom", 16, 5, False, None, ""), ("x.npz", "ViT-B_16", 224, 0, False, None, ""),
])
def test_the_family_is_said_where_something_proves_it(name, model, size, classes, pre_logits, family, candidates):
    found = families(Path(name), model=model, img_size=(size, size), classes=classes, pre_logits=pre_logits)
    assert found == (family, (family,) if family else tuple(candidates.split()))


def test_an_optimizers_state_tells_the_sam_file_that_has_it():
    about = dict(model="ViT-S_16", img_size=(224, 224), classes=1000, pre_logits=False)
    assert families(Path("x.npz"), **about) == (None, ("augreg", "sam"))
    assert families(Path("x.npz"), **about, repairs=("prefix opt/target/",)) == ("sam", ("sam",))


def test_every_copy_belongs_to_one_published_file_and_to_a_known_model():
    for name in [*published.SAME_WEIGHTS, *published.GOOGLE_ONLY]:
        folder, stem = name.split("/")
        assert name in published.SIZES or folder == "gsam" or published.AUGREG.fullmatch(stem), name
        assert published.model_name(name) in CONFIGS and published.image_size(name) in (224, 384)
    repositories = [repository for copies in published.SAME_WEIGHTS.values() for repository in copies]
    assert len(set(repositories)) == len(repositories)
    assert all(repository.startswith(("timm/", "google/vit-")) for repository in repositories)
    assert not set(published.GOOGLE_ONLY) & set(published.SAME_WEIGHTS)


def test_the_listed_sizes_are_those_of_the_float32_parameters():
    for name, size in published.SIZES.items():
        if name == "sam/ViT-S_16":  # three copies of each parameter: an optimizer's state is with them
            continue
        config, classes = CONFIGS[published.model_name(name)], 1000
        if name.startswith("imagenet21k/"):
            config, classes = replace(config, representation_size=config.hidden_size), 21843
        with torch.device("meta"):
            model = VisionTransformer(config, published.image_size(name), classes)
        assert sum(p.numel() for p in model.parameters()) * 4 / 2**20 == pytest.approx(size, rel=0.005), name


def test_timms_tables_name_the_very_file_for_each_augreg_and_sam_copy():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    for name, copies in published.SAME_WEIGHTS.items():
        for repository in copies:
            if repository.startswith("timm/"):
                config = timm.get_pretrained_cfg(repository.removeprefix("timm/"))
                assert config.hf_hub_id == repository and config.input_size[-1] == published.image_size(name)
                if name.startswith(("augreg/", "sam/")):
                    assert config.url == f"https://storage.googleapis.com/vit_models/{name}.npz"


def test_the_readme_lists_each_file_and_each_copy():
    text = (Path(published.__file__).parents[1] / "checkpoint" / "README.md").read_text(encoding="utf-8")
    for name in [*published.SIZES, *published.SAME_WEIGHTS, *published.GOOGLE_ONLY]:
        assert f"| {name.split('/')[1]} |" in text
        assert all(repository in text for repository in published.SAME_WEIGHTS.get(name, ()))
