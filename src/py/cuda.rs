//! The CUDA kernels on torch tensors: addresses, shapes and strides in, everything checked before anything is launched.

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::device::cuda;

/// What was built and what this machine has. Opens the driver, creates no context, raises nothing.
#[pyfunction]
pub(super) fn cuda_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    let built = cuda::ARCHITECTURES.split(',').filter(|code| !code.is_empty());
    info.set_item("architectures", PyList::new(py, built)?)?;
    info.set_item("nvcc", Some(cuda::NVCC).filter(|version| !version.is_empty()))?;
    info.set_item("fatbin_bytes", cuda::fatbin_bytes())?;
    // The first call runs the driver's initialisation.
    let (version, devices) = py.detach(|| (cuda::driver_version(), cuda::devices()));
    info.set_item("driver", version.as_ref().ok())?;
    let why = version
        .as_ref()
        .err()
        .or(devices.as_ref().err())
        .map(ToString::to_string);
    info.set_item("driver_error", why)?;
    let list = PyList::empty(py);
    for device in devices.unwrap_or_default() {
        let one = PyDict::new(py);
        one.set_item("name", &device.name)?;
        one.set_item("capability", (device.major, device.minor))?;
        one.set_item("multiprocessors", device.multiprocessors)?;
        one.set_item("supported", cuda::runs_on(device.major, device.minor))?;
        list.append(one)?;
    }
    info.set_item("devices", list)?;
    Ok(info)
}
