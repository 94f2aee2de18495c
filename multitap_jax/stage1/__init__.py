"""Stage 1: fine-tune a backbone and its reward head on human scores with mean squared error."""
