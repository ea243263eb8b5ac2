"""Translation with Transformers in both spaces: data, network, training, BLEU."""
