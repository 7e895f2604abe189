"""Attacks: audits of unlearned models, by whoever has their weights."""
