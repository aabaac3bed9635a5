"""What a toy VAE is told: how unlike its pictures are, and how its latent space is to lie."""

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor


def unlikeness(error: Tensor) -> Tensor:
    """What is wrong with pictures, from their pixels' errors [N, 3, H, W]."""
    loss = error.abs().mean() + error.square().mean()
    # Means over squares weigh what one pixel's error does not show, a hue that drifts over a whole area, and the
    # channels' differences what is learnt last, colours apart from light and dark.
    for side in (1, 8, 32):
        mean = F.avg_pool2d(error, side)
        loss = loss + mean.abs().mean() + 3 * (mean - mean.mean(dim=1, keepdim=True)).abs().mean()
    return loss


def rms(error: Tensor) -> Tensor:
    """For the log."""
    return error.square().mean().sqrt()


def even_out(vae: diffusers.AutoencoderKL, pixels: Tensor) -> None:
    """Turn and scale the latent space so that all its directions vary alike; what is drawn stays as it was.

    As learnt, one direction, how light the ground is, has a thousand times the variance of the least, and half of the
    whole: noise that hides it has long hidden all shapes, so that a denoiser hardly ever has to make one up.
    """
    count = vae.config.latent_channels
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(32)])
        variances, axes = torch.linalg.eigh(torch.cov(means.transpose(0, 1).flatten(1)))
        scales = variances.clamp(min=variances.mean() / 100).rsqrt()
        turn = axes * scales @ axes.T
        out, into = vae.encoder.conv_out, vae.decoder.conv_in
        out.weight[:count] = torch.einsum("ij,j...->i...", turn, out.weight[:count])
        out.bias[:count] = turn @ out.bias[:count]
        out.bias[count:] += turn.square().sum(dim=1).log()  # the posterior's variance, where its channels' are alike
        into.weight.copy_(torch.einsum("oj...,ji->oi...", into.weight, axes / scales @ axes.T))
    vae.register_to_config(scaling_factor=1.0)
