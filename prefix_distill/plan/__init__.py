"""What a run takes on a machine that is not there."""

# The variables of a host of the machine; libtpu reads them when it is loaded.
# With these two compilers may run side by side, and none looks for metadata.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # A program for devices that are not there cannot be kept.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
