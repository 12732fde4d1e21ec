"""What has to be looked at on a GPU: stages for a machine without network, and what NVIDIA's tools say."""
