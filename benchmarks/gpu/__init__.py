"""GPU kernels: timings on a device; what the compilers and the simulator say of them, without one."""
