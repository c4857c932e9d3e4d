//! A launch as the driver takes it: structures and numbers of cuda.h.

use std::ffi::{c_int, c_uint, c_void};

use super::params::Launch;

/// What the driver hands out and takes back.
pub(super) type Handle = *mut c_void;

pub(super) const SUCCESS: c_int = 0;
pub(super) const INVALID_CONTEXT: c_int = 201;
pub(super) const NO_BINARY_FOR_GPU: c_int = 209;
pub(super) const FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED: c_int = 8;
/// Registers, local bytes, static shared bytes.
pub(super) const USAGE_ATTRIBUTES: [c_int; 3] = [4, 3, 1];
pub(super) const DEVICE_ATTRIBUTE_MAJOR: c_int = 75;
pub(super) const DEVICE_ATTRIBUTE_MINOR: c_int = 76;
/// Shared memory of a block that asked for permission, static and dynamic.
pub(super) const DEVICE_ATTRIBUTE_MAX_SHARED: c_int = 97;
pub(super) const DEVICE_ATTRIBUTE_MULTIPROCESSORS: c_int = 16;
pub(super) const DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: c_int = 120;
/// Architecture that a kernel's code was written for (a device may run that of an older one, compiled by its driver), and the first with
/// clusters.
pub(super) const FUNC_ATTRIBUTE_PTX_VERSION: c_int = 5;
pub(super) const FIRST_WITH_CLUSTERS: c_int = 90;
const LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION: c_uint = 4;

/// `CUlaunchConfig` of cuda.h.
#[repr(C)]
pub(super) struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    attribute_count: c_uint,
}

/// `CUlaunchAttribute` of cuda.h with the value `clusterDim`, and the rest of the 64 bytes that any value has.
#[repr(C)]
struct LaunchAttribute {
    id: c_uint,
    padding: c_uint,
    cluster: [c_uint; 3],
    rest: [c_uint; 13],
}

/// `launch` as the driver takes it, with the one attribute of clusters where there are any; calls `then` with it.
pub(super) fn with_config<T>(launch: Launch, stream: usize, then: impl FnOnce(*const LaunchConfig) -> T) -> T {
    let cluster = LaunchAttribute {
        id: LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        padding: 0,
        cluster: [1, 1, launch.cluster],
        rest: [0; 13],
    };
    let config = LaunchConfig {
        grid: launch.grid,
        block: [launch.block, 1, 1],
        shared: launch.shared,
        stream: std::ptr::with_exposed_provenance_mut(stream),
        attributes: &raw const cluster,
        attribute_count: c_uint::from(launch.cluster > 1),
    };
    then(&raw const config)
}
