"""Rows of predictions: a line an image of the split, in its order, whatever the names."""

import io

import torch

from utils.data import Split
from utils.evaluation import Outputs
from utils.tables import write_rows


def test_predictions_are_a_line_an_image_of_the_split():
    split = Split(["x/a.png", "x/b.png"], torch.tensor([1, 0]), ("cat", 'a "dog"'))
    said = Outputs(torch.tensor([0, 1]), split.labels, torch.zeros(2), torch.tensor([1, 1]), torch.tensor([0.5, 0.75]),
                   torch.zeros(2), None)
    write_rows(file := io.StringIO(), split, said)
    assert file.getvalue() == ('image,label,predicted,confidence\n'
                               'x/a.png,"a ""dog""","a ""dog""",0.500000\nx/b.png,cat,"a ""dog""",0.750000\n')


def test_several_labels_are_joined_and_decoded_images_keep_the_names_of_their_files():
    split = Split(torch.zeros(2, 3, 4, 4), torch.tensor([[1.0, 1.0], [0.0, 0.0]]), ("cat", "dog"),
                  files=["a.png", "b.png"])
    said = Outputs(torch.tensor([0, 1]), split.labels, torch.zeros(2), torch.tensor([[False, True], [False, False]]),
                   None, None, None)
    write_rows(file := io.StringIO(), split, said)
    assert file.getvalue() == "image,label,predicted\na.png,cat|dog,dog\nb.png,,\n"
    assert split.subset([1]).name(0) == "b.png" and Split(split.images, split.labels, ()).name(1) == "1"
