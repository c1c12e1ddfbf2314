"""The machinery around `infusion_core`: staging, shards, training, tracking, registry, evaluation, figures."""
