"""What a model is worth: predictions, metrics per site, metrics pooled exactly over sites."""
