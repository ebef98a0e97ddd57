"""The same work in PyTorch with lightly: `python -m benchmarks.peer SUBJECT JSON`, a worker."""

import contextlib
import itertools
import json
import os
import sys

import lightly.loss
import lightly.models.utils
import torch
import torchvision
from lightly.models import modules
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.lars import LARS

from benchmarks.worker import serve


def pipeline(images, image_size, batch_size, batches):
    """Images from disk, or from an array in memory as torchvision's CIFAR10, to two full views."""
    transform = BYOLTransform(
        BYOLView1Transform(input_size=image_size), BYOLView2Transform(input_size=image_size)
    )
    if images.endswith(".npy"):
        dataset = _InMemory(images, transform)
    else:
        dataset = torchvision.datasets.ImageFolder(images, transform)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=os.cpu_count(),
        persistent_workers=True,
    )
    endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def do_round():
        for _ in itertools.islice(endless, batches):
            pass
        return batches * batch_size

    return do_round


class _InMemory(torch.utils.data.Dataset):
    def __init__(self, path, transform):
        import numpy as np

        self.images = np.load(path)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(torchvision.transforms.functional.to_pil_image(self.images[index])), 0


class _Model(torch.nn.Module):
    """lightly's own example of BYOL: encoder, heads, and a copy of both that follows."""

    def __init__(self, encoder, stem):
        super().__init__()
        self.encoder, size = _encoder(encoder, stem)
        self.projector = modules.BYOLProjectionHead(size, 4096, 256)
        self.predictor = modules.BYOLPredictionHead(256, 4096, 256)
        self.target_encoder, _ = _encoder(encoder, stem)
        self.target_projector = modules.BYOLProjectionHead(size, 4096, 256)
        for parameter in (*self.target_encoder.parameters(), *self.target_projector.parameters()):
            parameter.requires_grad = False

    def forward(self, view):
        return self.predictor(self.projector(self.encoder(view).flatten(1)))

    @torch.no_grad()
    def forward_target(self, view):
        return self.target_projector(self.target_encoder(view).flatten(1))


def _encoder(name, stem):
    network = getattr(torchvision.models, name)()
    size = network.fc.in_features
    network.fc = torch.nn.Identity()
    if stem == "small":
        network.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        network.maxpool = torch.nn.Identity()
    return network, size


def step(encoder, stem, image_size, batch_size, precision, steps):
    """Training steps on one batch in memory, with LARS and the update of the target."""
    torch.set_num_threads(os.cpu_count())
    model = _Model(encoder, stem).to(memory_format=torch.channels_last)
    criterion = lightly.loss.NegativeCosineSimilarity()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = LARS(trained, lr=0.2, momentum=0.9, weight_decay=1.5e-6)
    shape = [batch_size, 3, image_size, image_size]
    view1, view2 = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
    computing = contextlib.nullcontext
    if precision == "bfloat16":
        computing = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731

    def do_step():
        lightly.models.utils.update_momentum(model.encoder, model.target_encoder, m=0.99)
        lightly.models.utils.update_momentum(model.projector, model.target_projector, m=0.99)
        with computing():
            prediction1, target1 = model(view1), model.forward_target(view1)
            prediction2, target2 = model(view2), model.forward_target(view2)
        loss = 0.5 * (
            criterion(prediction1.float(), target2.float())
            + criterion(prediction2.float(), target1.float())
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def do_round():
        for _ in range(steps):
            do_step()
        return steps

    return do_round


def embed(encoder, images, image_size, batch_size):
    """Images from disk to embeddings."""
    torch.set_num_threads(os.cpu_count())
    resized = torchvision.transforms.Resize(image_size * 8 // 7)
    transform = torchvision.transforms.Compose(
        [
            *(resized, torchvision.transforms.CenterCrop(image_size)),
            *(torchvision.transforms.ToTensor(), torchvision.transforms.Normalize([0.5], [0.25])),
        ]
    )
    network = _encoder(encoder, "imagenet")[0].eval().to(memory_format=torch.channels_last)
    dataset = torchvision.datasets.ImageFolder(images, transform)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size, num_workers=os.cpu_count(), persistent_workers=True
    )

    @torch.inference_mode()
    def do_round():
        vectors = [network(batch.to(memory_format=torch.channels_last)) for batch, _ in loader]
        return len(torch.cat(vectors))

    return do_round


SUBJECTS = {function.__name__: function for function in (pipeline, step, embed)}

if __name__ == "__main__":
    subject, arguments = sys.argv[1:]
    serve(SUBJECTS[subject](**json.loads(arguments)))
