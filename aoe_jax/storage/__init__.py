"""Access to disks and object stores: paths, files, retries, leases."""
