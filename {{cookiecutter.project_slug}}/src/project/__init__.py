"""What the levels share: settings, the data schema, the saved model's manifest, runs."""
