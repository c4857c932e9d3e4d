//! The contracts of the CUDA kernels' launches: what is refused before anything reaches a driver, and what reaches one.
//!
//! A stand-in for the driver writes down what it is asked to launch. No GPU and no kernels are needed.

mod cuda_launch {
    mod calls;
    mod contracts;
    mod grids;
    mod launches;
    mod numbers;
}
