"""What the first layer has learned: principal components and cosines, against numpy's."""

import numpy as np
import torch

from models.configs import replace
from models.embedding import patch_filters, position_similarity
from models.modeling import VisionTransformer
from tests.conftest import randomise


def test_filters_are_the_principal_components(tiny_config):
    model = randomise(VisionTransformer(tiny_config, 16, 5))
    found = patch_filters(model, 6)
    weights = model.patch_embed.proj.weight.detach().double().flatten(1).numpy()
    _, vectors = np.linalg.eigh(np.cov(weights.T))
    for i, component in enumerate(found.flatten(1).double().numpy()):
        assert abs(abs(component @ vectors[:, -1 - i]) - 1) < 1e-5 and component[np.abs(component).argmax()] > 0
    assert found.shape == (6, 3, 4, 4) and patch_filters(model, 99).shape == (32, 3, 4, 4)


def test_filters_of_a_hybrid_are_those_that_see_pixels(tiny_config):
    for layers in ((), (1,)):
        config = replace(tiny_config, resnet={"num_layers": layers, "width_factor": 0.5}, patch_size=(1, 1))
        assert patch_filters(randomise(VisionTransformer(config, 16, 5)), 4).shape == (4, 3, 7, 7)


def test_similarity_is_the_cosine_of_position_rows(tiny_config):
    for classifier in ("token", "gap"):
        model = randomise(VisionTransformer(replace(tiny_config, classifier=classifier), (16, 24), 5))
        found = position_similarity(model)
        rows = model.pos_embed[0, -24:].detach().double()
        expected = rows[7] @ rows[15] / rows[7].norm() / rows[15].norm()
        assert found.shape == (4, 6, 4, 6) and abs(found[1, 1, 2, 3] - expected) < 1e-6
        assert torch.allclose(torch.diagonal(found.reshape(24, 24)), torch.ones(24))
