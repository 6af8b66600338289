"""Draw one digit at growing guidance: m = m_u + w (m_c - m_u)   (Ho & Salimans 2022)."""

import torch

import fastddpm
from fastddpm.evaluation.classifier import SHIPPED_CLASSIFIER, load_classifier

judge = load_classifier(SHIPPED_CLASSIFIER)
rows = []
for w in (1.0, 2.0, 4.0):
    x_0 = fastddpm.sample("digits", seeds=range(8), class_labels=7, guidance=w)
    with torch.no_grad():
        recognised = (judge(x_0).argmax(dim=1) == 7).float().mean()
    print(f"w = {w}: {float(recognised):.0%} of 8 are recognised as sevens")
    rows.append(x_0)
fastddpm.save_grid(torch.cat(rows), "guidance.png", columns=8, scale=4)
