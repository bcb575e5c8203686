"""Choice of a device: the same for the Embedder, the evaluation and all runs."""

import pytest
import torch
from torch import nn

from passreid_models.device import pick_device, process_group
from passreid_models.embed import Embedder


def test_none_and_auto_are_the_same_device_and_a_device_stays_what_it_is():
    assert pick_device() == pick_device("auto") == pick_device(None)
    assert pick_device(torch.device("cpu")) == pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_the_same_words_everywhere(name):
    message = rf"^device: '{name}' is not there \(.+\)$"
    with pytest.raises(ValueError, match=message):
        pick_device(name)
    with pytest.raises(ValueError, match=message):
        Embedder(nn.Identity(), device=name)
    with pytest.raises(ValueError, match=message), process_group(name):
        pass
