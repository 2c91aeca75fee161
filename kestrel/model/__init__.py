"""The base model: loaded and audited in 4 bit, its fast layers, the loss and likelihoods."""
