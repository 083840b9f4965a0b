"""Google Cloud: Vertex AI, Cloud Storage and the names of resources."""
