"""Is a tensor that is put together later the same to who saves it, whole and in views, and is it built once it is asked for?"""

import torch

from checkpointing.safetensors_writer import safetensors_chunks
from families.weights import stored_views
from sharding import Deferred, whole


def test_views_of_a_deferred_tensor_are_views_of_what_is_built():
    values, built = torch.randn(3, 8, 5), []
    deferred = Deferred.like(values.to("meta"), lambda: built.append(1) or values)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found, expected = (stored_views("mixtral", name, tensor) for tensor in (deferred, values))
    assert found.keys() == expected.keys() and len(expected) == 6
    assert [one.shape for one in found.values()] == [one.shape for one in expected.values()] and not built
    for key, tensor in expected.items():
        assert torch.equal(whole(found[key]), tensor), key
    assert torch.equal(whole(deferred[1].t()), values[1].t())


def test_a_file_of_deferred_tensors_has_the_same_bytes():
    tensors = {"a": torch.randn(4, 3), "b": torch.arange(6.0).view(2, 3), "c": torch.tensor(7.0)}
    deferred = {
        name: Deferred.like(one.t().to("meta"), lambda one=one: one.t()) for name, one in tensors.items() if one.ndim
    }
    found = deferred | {"c": tensors["c"]}
    expected = {name: one.t() if one.ndim else one for name, one in tensors.items()}
    files = [b"".join(map(bytes, safetensors_chunks(each, {}))) for each in (found, expected)]
    assert files[0] == files[1]
