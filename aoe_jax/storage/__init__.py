"""All that touches disks and object stores: paths, files, retries, leases."""
