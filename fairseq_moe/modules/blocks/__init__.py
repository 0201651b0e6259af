"""What else is a decoder layer made of? Norms, rotary positions, grouped and latent attention."""
