"""Inpaint digits: what a mask hides is drawn to fit what it leaves, in as many ways as there are seeds."""

import torch

import fastddpm

model = fastddpm.load("digits")
label = 3
digit = fastddpm.sample(model, seeds=[1], class_labels=[label])  # stands for an image of yours, in [-1, 1]

masks = torch.zeros(3, 1, 32, 32)  # 1 where to draw
masks[0, :, 16:] = 1
masks[1, :, :, 16:] = 1
masks[2, :, 10:22, 10:22] = 1

# Each stretch of 2 of the 10 steps is walked twice (RePaint), so that both parts come to fit.
drawn = fastddpm.sample(
    model,
    seeds=range(3),
    known=digit,
    mask=masks,
    class_labels=label,
    sampler="ddpm",
    steps=10,
    sampler_options={"jump_length": 2, "jump_n_sample": 2},
)

hidden = torch.where(masks > 0, 0.0, digit)
rows = torch.stack([digit.expand_as(drawn), hidden, drawn], dim=1)
fastddpm.save_grid(rows.flatten(0, 1), "inpainting.png", columns=3)
print("wrote inpainting.png: for each mask the digit, what is known of it, and what was drawn")
