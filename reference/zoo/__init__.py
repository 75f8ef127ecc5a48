"""The zoo: networks of other kinds than language models, steered towards what is known to be true."""
