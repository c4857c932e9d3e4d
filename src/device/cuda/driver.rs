//! The CUDA driver, opened when first needed, and the kernels embedded in this library.
//!
//! ```text
//! fatbin in this library ── cuLibraryLoadData ──> library ── cuLibraryGetKernel ──> kernel ── cuLaunchKernelEx ──> caller's stream
//!        (build.rs)            once a process                   once a kernel
//! ```
//!
//! - Nothing is linked: `libcuda.so.1` is opened at the first launch, so the same build runs where there is no GPU.
//! - No context is ever created. The caller's is current (torch's primary one), streams and memory are the caller's, and a
//!   launch neither allocates nor synchronises, so it can be captured in a graph once its kernel has been loaded.
//! - A kernel takes one structure by value, mirrored in Rust with `#[repr(C)]`. Its size is compared with what the driver
//!   says the kernel takes before the first launch.
//!
//! # Safety, stated once
//! The driver's functions are called through pointers looked up by name and cast to the signatures of `cuda.h`. The library is
//! never closed, so they stay valid. Handles that it returned are passed back unchanged. Out-pointers point to locals. What a
//! kernel does with the addresses in its parameters is its launcher's promise: see [`Driver::launch`].

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use libloading::Library;

use super::config::{
    DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, DEVICE_ATTRIBUTE_MAJOR, DEVICE_ATTRIBUTE_MAX_SHARED, DEVICE_ATTRIBUTE_MINOR,
    DEVICE_ATTRIBUTE_MULTIPROCESSORS, FIRST_WITH_CLUSTERS, FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED,
    FUNC_ATTRIBUTE_PTX_VERSION, Handle, INVALID_CONTEXT, LaunchConfig, NO_BINARY_FOR_GPU, SUCCESS, USAGE_ATTRIBUTES,
    with_config,
};
use super::fatbin::{ARCHITECTURES, FATBIN, fatbin_bytes, oldest_driver};
use super::once::Once;
use super::params::Launch;
use crate::error::{Error, Result};

fn oldest_driver_text() -> String {
    let (major, minor) = oldest_driver();
    format!("{major}.{minor}")
}

/// Dynamic shared memory that needs no permission: 48 KiB less what any kernel has in static shared memory.
const FREE_SHARED: u32 = 24 * 1024;

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// What this crate calls of the driver.
        struct Functions {
            version: c_int,
            $($field: unsafe extern "system" fn($($argument),*) -> c_int,)*
        }

        impl Functions {
            fn resolve(library: &Library, version: c_int) -> Result<Self> {
                Ok(Self {
                    version,
                    $($field: {
                        // SAFETY: the signature is that of cuda.h; see the module.
                        let found = unsafe {
                            library.get::<unsafe extern "system" fn($($argument),*) -> c_int>(concat!($symbol, "\0").as_bytes())
                        };
                        *found.map_err(|_| Error::NoSymbol {
                            symbol: $symbol,
                            version: version_text(version),
                            expected: oldest_driver_text(),
                        })?
                    },)*
                })
            }
        }
    };
}

functions! {
    init = "cuInit" (c_uint);
    device_count = "cuDeviceGetCount" (*mut c_int);
    device_name = "cuDeviceGetName" (*mut c_char, c_int, c_int);
    device_attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
    error_name = "cuGetErrorName" (c_int, *mut *const c_char);
    error_text = "cuGetErrorString" (c_int, *mut *const c_char);
    current_device = "cuCtxGetDevice" (*mut c_int);
    retain_context = "cuDevicePrimaryCtxRetain" (*mut Handle, c_int);
    set_context = "cuCtxSetCurrent" (Handle);
    load_library = "cuLibraryLoadData" (
        *mut Handle, *const c_void, *mut c_int, *mut *mut c_void, c_uint, *mut c_int, *mut *mut c_void, c_uint
    );
    get_kernel = "cuLibraryGetKernel" (*mut Handle, Handle, *const c_char);
    parameter_info = "cuKernelGetParamInfo" (Handle, usize, *mut usize, *mut usize);
    get_function = "cuKernelGetFunction" (*mut Handle, Handle);
    kernel_attribute = "cuKernelGetAttribute" (*mut c_int, c_int, Handle, c_int);
    set_kernel_attribute = "cuKernelSetAttribute" (c_int, c_int, Handle, c_int);
    active_clusters = "cuOccupancyMaxActiveClusters" (*mut c_int, Handle, *const LaunchConfig);
    launch = "cuLaunchKernelEx" (*const LaunchConfig, Handle, *mut *mut c_void, *mut *mut c_void);
}

fn version_text(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

impl Functions {
    fn open() -> Result<Self> {
        let name = if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" };
        let no_driver = |got: String| Error::NoDriver {
            got,
            expected: oldest_driver_text(),
        };
        // SAFETY: the driver library's initialisers have no preconditions; every CUDA program runs them.
        let library = unsafe { Library::new(name) }.map_err(|why| no_driver(format!("none ({why})")))?;
        // SAFETY: see the module.
        let version = unsafe {
            let get = library
                .get::<unsafe extern "system" fn(*mut c_int) -> c_int>(b"cuDriverGetVersion\0")
                .map_err(|why| no_driver(format!("a library that is no CUDA driver ({why})")))?;
            let mut version = 0;
            get(&raw mut version);
            version
        };
        let driver = Self::resolve(&library, version)?;
        std::mem::forget(library);
        // SAFETY: see the module. Initialising twice is allowed, and creates no context.
        let code = unsafe { (driver.init)(0) };
        if code != SUCCESS {
            return Err(driver.error("cuInit", code));
        }
        let (major, minor) = oldest_driver();
        if (version as u32) < major * 1000 + minor * 10 {
            return Err(no_driver(format!("one of CUDA {}", version_text(version))));
        }
        Ok(driver)
    }

    fn error(&self, call: impl Into<String>, code: c_int) -> Error {
        let ask = |function: unsafe extern "system" fn(c_int, *mut *const c_char) -> c_int| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: see the module; the string is the driver's own and static.
            unsafe {
                if function(code, &raw mut text) != SUCCESS || text.is_null() {
                    return "an unknown error".to_owned();
                }
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        Error::Driver {
            call: call.into(),
            code,
            name: ask(self.error_name),
            text: ask(self.error_text),
        }
    }

    fn check(&self, call: &str, code: c_int) -> Result<()> {
        if code == SUCCESS {
            Ok(())
        } else {
            Err(self.error(call, code))
        }
    }

    fn attribute(&self, attribute: c_int, device: c_int) -> Result<i32> {
        let mut value = 0;
        // SAFETY: see the module.
        self.check("cuDeviceGetAttribute", unsafe {
            (self.device_attribute)(&raw mut value, attribute, device)
        })?;
        Ok(value)
    }

    fn device(&self, index: c_int) -> Result<Device> {
        let mut name = [0 as c_char; 256];
        // SAFETY: see the module; the driver writes at most the given number of bytes, the last of them zero.
        let name = unsafe {
            self.check(
                "cuDeviceGetName",
                (self.device_name)(name.as_mut_ptr(), name.len() as c_int, index),
            )?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        Ok(Device {
            name,
            major: self.attribute(DEVICE_ATTRIBUTE_MAJOR, index)?,
            minor: self.attribute(DEVICE_ATTRIBUTE_MINOR, index)?,
            multiprocessors: self.attribute(DEVICE_ATTRIBUTE_MULTIPROCESSORS, index)?,
        })
    }

    /// Device of the calling thread's current context.
    fn current(&self) -> Result<c_int> {
        let mut device = 0;
        // SAFETY: see the module.
        let code = unsafe { (self.current_device)(&raw mut device) };
        self.check(
            "cuCtxGetDevice (a context must be current: allocate a tensor on the device first)",
            code,
        )?;
        Ok(device)
    }

    /// The same; a thread that has no context yet, because nothing of CUDA was asked of it before, gets the primary one of `wanted`, which is
    /// the one that torch uses.
    fn current_or_primary(&self, wanted: c_int) -> Result<c_int> {
        match self.current() {
            Err(Error::Driver {
                code: INVALID_CONTEXT, ..
            }) => {}
            known => return known,
        }
        let mut context = null_mut();
        // SAFETY: see the module. The context is never given back: it is torch's, and lives as long as the process.
        unsafe {
            self.check(
                "cuDevicePrimaryCtxRetain",
                (self.retain_context)(&raw mut context, wanted),
            )?;
            self.check("cuCtxSetCurrent", (self.set_context)(context))?;
        }
        self.current()
    }
}

/// A GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Marketing name.
    pub name: String,
    /// Compute capability, major.
    pub major: i32,
    /// Compute capability, minor.
    pub minor: i32,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
}

static DRIVER: Once<Functions> = Once::new();

fn driver() -> Result<&'static Functions> {
    DRIVER.get(Functions::open)
}

/// The driver's CUDA version, such as `13.0`. Opens the driver; creates no context.
///
/// # Errors
/// [`Error::NoDriver`], [`Error::NoSymbol`], [`Error::Driver`].
pub fn driver_version() -> Result<String> {
    driver().map(|driver| version_text(driver.version))
}

/// Every GPU of this machine, in the driver's order.
///
/// # Errors
/// As [`driver_version`].
pub fn devices() -> Result<Vec<Device>> {
    let driver = driver()?;
    let mut count = 0;
    // SAFETY: see the module.
    driver.check("cuDeviceGetCount", unsafe { (driver.device_count)(&raw mut count) })?;
    (0..count).map(|index| driver.device(index)).collect()
}

struct Loaded {
    driver: &'static Functions,
    library: AtomicPtr<c_void>,
}

static LOADED: Once<Loaded> = Once::new();

fn load() -> Result<&'static Loaded> {
    LOADED.get(|| {
        if FATBIN.0.is_empty() {
            return Err(Error::NoKernels);
        }
        let driver = driver()?;
        let mut library = null_mut();
        // SAFETY: see the module; the fatbin is static, aligned and what nvcc wrote.
        let code = unsafe {
            (driver.load_library)(
                &raw mut library,
                FATBIN.0.as_ptr().cast(),
                null_mut(),
                null_mut(),
                0,
                null_mut(),
                null_mut(),
                0,
            )
        };
        driver.check("cuLibraryLoadData", code)?;
        Ok(Loaded {
            driver,
            library: AtomicPtr::new(library),
        })
    })
}

/// What launching needs of a driver. [`Cuda`] is this machine's; tests have one that writes down what reaches it.
pub trait Driver {
    /// Ordinal of the GPU whose context is current on this thread, where there are kernels to launch; on a thread without a context
    /// the primary one of the GPU `wanted` becomes current.
    ///
    /// # Errors
    /// [`Error::NoKernels`], [`Error::NoDriver`], [`Error::NoSymbol`], [`Error::Driver`].
    fn current_device(&self, wanted: i32) -> Result<i32>;

    /// Loads a kernel that takes `bytes` bytes of parameters into the current context, as a launch that is to be captured in a graph
    /// needs, with permission for up to `shared` bytes of dynamic shared memory; says what its code takes on the current device.
    ///
    /// # Errors
    /// As [`Self::launch`].
    fn load(&self, kernel: &'static Kernel, bytes: usize, shared: u32) -> Result<Usage>;

    /// Whether the current device and the code that it runs have clusters of blocks, and room for one of `launch` with a kernel that takes `bytes` bytes of
    /// parameters.
    ///
    /// # Errors
    /// As [`Self::launch`].
    fn runs_cluster(&self, kernel: &'static Kernel, bytes: usize, launch: Launch) -> Result<bool>;

    /// Launches a kernel with `parameters` on `stream`, the caller's `CUstream` (0: the legacy default stream) of the device whose
    /// context is current. No extent of the grid is 0.
    ///
    /// # Safety
    /// `P` mirrors the kernel's parameter structure field by field. Every address in it is device memory of the current context
    /// (or null where the kernel allows that), as large as the sizes and strides beside it say, and lives until the stream has
    /// passed the launch. Indices that lie in device memory are in range, as `cuda/params.h` states them.
    ///
    /// # Errors
    /// [`Error::NoKernels`], [`Error::NoDriver`], [`Error::NoSymbol`], [`Error::UnsupportedDevice`], [`Error::KernelParameters`],
    /// [`Error::Driver`].
    unsafe fn launch<P: Copy + 'static>(
        &self,
        kernel: &'static Kernel,
        launch: Launch,
        stream: usize,
        parameters: &P,
    ) -> Result<()>;
}

/// The CUDA driver of this machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cuda;

impl Driver for Cuda {
    fn current_device(&self, wanted: i32) -> Result<i32> {
        if fatbin_bytes() == 0 {
            return Err(Error::NoKernels);
        }
        driver()?.current_or_primary(wanted)
    }

    fn load(&self, kernel: &'static Kernel, bytes: usize, shared: u32) -> Result<Usage> {
        kernel.load(bytes, shared)
    }

    fn runs_cluster(&self, kernel: &'static Kernel, bytes: usize, launch: Launch) -> Result<bool> {
        kernel.runs_cluster(bytes, launch)
    }

    unsafe fn launch<P: Copy + 'static>(
        &self,
        kernel: &'static Kernel,
        launch: Launch,
        stream: usize,
        parameters: &P,
    ) -> Result<()> {
        // SAFETY: passed on to the caller.
        unsafe { kernel.launch(launch, stream, parameters) }
    }
}

/// One kernel of the fatbin: a static with its name, filled when first launched.
#[derive(Debug)]
pub struct Kernel {
    name: &'static CStr,
    handle: AtomicPtr<c_void>,
    /// Dynamic shared memory that was asked for, for the first devices of a machine.
    shared: [AtomicU32; 16],
}

impl Kernel {
    /// Names it; touches nothing.
    pub const fn new(name: &'static CStr) -> Self {
        Self {
            name,
            handle: AtomicPtr::new(null_mut()),
            shared: [const { AtomicU32::new(FREE_SHARED) }; 16],
        }
    }

    /// The name in the fatbin.
    pub fn name(&self) -> &'static str {
        self.name.to_str().unwrap_or_default()
    }

    /// The kernel, looked up and its parameter checked to be one structure of `bytes` bytes.
    fn resolve(&self, loaded: &Loaded, bytes: usize) -> Result<Handle> {
        let known = self.handle.load(Ordering::Acquire);
        if !known.is_null() {
            return Ok(known);
        }
        let driver = loaded.driver;
        let mut kernel = null_mut();
        // SAFETY: see the module.
        let code = unsafe {
            (driver.get_kernel)(
                &raw mut kernel,
                loaded.library.load(Ordering::Relaxed),
                self.name.as_ptr(),
            )
        };
        if code == NO_BINARY_FOR_GPU {
            return Err(unsupported(driver));
        }
        driver.check(&format!("cuLibraryGetKernel of {}", self.name()), code)?;
        let (mut offset, mut size) = (0, 0);
        // SAFETY: see the module.
        let code = unsafe { (driver.parameter_info)(kernel, 0, &raw mut offset, &raw mut size) };
        if code == NO_BINARY_FOR_GPU {
            return Err(unsupported(driver));
        }
        driver.check(&format!("cuKernelGetParamInfo of {}", self.name()), code)?;
        if size != bytes {
            return Err(Error::KernelParameters {
                kernel: self.name().to_owned(),
                got: size,
                expected: bytes,
            });
        }
        self.handle.store(kernel, Ordering::Release);
        Ok(kernel)
    }

    /// Permission for more dynamic shared memory than every kernel may have, once per device.
    fn allow_shared(&self, driver: &Functions, kernel: Handle, bytes: u32) -> Result<()> {
        let device = driver.current()?;
        let allowed = self.shared.get(device as usize);
        if allowed.is_some_and(|allowed| allowed.load(Ordering::Relaxed) >= bytes) {
            return Ok(());
        }
        // SAFETY: see the module.
        let code =
            unsafe { (driver.set_kernel_attribute)(FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED, bytes as c_int, kernel, device) };
        driver.check(
            &format!(
                "cuKernelSetAttribute of {} ({bytes} bytes of shared memory)",
                self.name()
            ),
            code,
        )?;
        if let Some(allowed) = allowed {
            allowed.fetch_max(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// See [`Driver::launch`].
    unsafe fn launch<P: Copy>(&self, launch: Launch, stream: usize, parameters: &P) -> Result<()> {
        let loaded = load()?;
        let driver = loaded.driver;
        let kernel = self.resolve(loaded, size_of::<P>())?;
        if launch.shared > FREE_SHARED {
            self.allow_shared(driver, kernel, launch.shared)?;
        }
        let mut pointers = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        let code = with_config(launch, stream, |config| {
            // SAFETY: see the module and this function's contract. The driver copies the parameters before it returns.
            unsafe { (driver.launch)(config, kernel, pointers.as_mut_ptr(), null_mut()) }
        });
        match code {
            SUCCESS => Ok(()),
            NO_BINARY_FOR_GPU => Err(unsupported(driver)),
            code => Err(driver.error(
                format!(
                    "cuLaunchKernelEx of {} (grid {:?}, {} threads, {} bytes of shared memory, clusters of {})",
                    self.name(),
                    launch.grid,
                    launch.block,
                    launch.shared,
                    launch.cluster
                ),
                code,
            )),
        }
    }

    /// The kernel in the current context.
    fn function(&self, driver: &Functions, kernel: Handle) -> Result<Handle> {
        let mut function = null_mut();
        // SAFETY: see the module.
        let code = unsafe { (driver.get_function)(&raw mut function, kernel) };
        if code == NO_BINARY_FOR_GPU {
            return Err(unsupported(driver));
        }
        driver.check(&format!("cuKernelGetFunction of {}", self.name()), code)?;
        Ok(function)
    }

    fn attribute(&self, driver: &Functions, kernel: Handle, attribute: c_int, device: c_int) -> Result<c_int> {
        let mut value = 0;
        // SAFETY: see the module.
        let code = unsafe { (driver.kernel_attribute)(&raw mut value, attribute, kernel, device) };
        driver.check(&format!("cuKernelGetAttribute of {}", self.name()), code)?;
        Ok(value)
    }

    /// See [`Driver::runs_cluster`].
    fn runs_cluster(&self, bytes: usize, launch: Launch) -> Result<bool> {
        let loaded = load()?;
        let driver = loaded.driver;
        let device = driver.current()?;
        let kernel = self.resolve(loaded, bytes)?;
        let code = self.attribute(driver, kernel, FUNC_ATTRIBUTE_PTX_VERSION, device)?;
        if code < FIRST_WITH_CLUSTERS || driver.attribute(DEVICE_ATTRIBUTE_CLUSTER_LAUNCH, device)? == 0 {
            return Ok(false);
        }
        let function = self.function(driver, kernel)?;
        if launch.shared > FREE_SHARED {
            self.allow_shared(driver, kernel, launch.shared)?;
        }
        let mut clusters = 0;
        // SAFETY: see the module.
        let code = with_config(launch, 0, |config| unsafe {
            (driver.active_clusters)(&raw mut clusters, function, config)
        });
        driver.check(&format!("cuOccupancyMaxActiveClusters of {}", self.name()), code)?;
        Ok(clusters > 0)
    }

    /// See [`Driver::load`].
    fn load(&self, bytes: usize, shared: u32) -> Result<Usage> {
        let loaded = load()?;
        let driver = loaded.driver;
        let kernel = self.resolve(loaded, bytes)?;
        let device = driver.current()?;
        self.function(driver, kernel)?;
        let mut values = [0; 3];
        for (value, attribute) in values.iter_mut().zip(USAGE_ATTRIBUTES) {
            *value = self.attribute(driver, kernel, attribute, device)?;
        }
        // What a launch will need at most; a device that has less takes what fits, and refuses a launch that asks for more.
        let limit = driver.attribute(DEVICE_ATTRIBUTE_MAX_SHARED, device)? - values[2];
        let shared = shared.min(u32::try_from(limit).unwrap_or(0));
        if shared > FREE_SHARED {
            self.allow_shared(driver, kernel, shared)?;
        }
        Ok(Usage {
            registers: values[0],
            local: values[1],
            shared: values[2],
        })
    }
}

/// What a kernel's code takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Registers per thread.
    pub registers: i32,
    /// Bytes of local memory per thread: spilled registers, and arrays on the stack.
    pub local: i32,
    /// Bytes of static shared memory per block.
    pub shared: i32,
}

fn unsupported(driver: &Functions) -> Error {
    match driver.current().and_then(|index| driver.device(index)) {
        Ok(device) => Error::UnsupportedDevice {
            device: device.name,
            major: device.major,
            minor: device.minor,
            built: ARCHITECTURES,
        },
        Err(why) => why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_or_a_build_without_kernels_is_told_what_to_do() {
        static KERNEL: Kernel = Kernel::new(c"probe");
        let launch = Launch {
            grid: [1; 3],
            block: 1,
            shared: 0,
            cluster: 1,
        };
        if driver_version().is_ok() {
            eprintln!("skipped: this machine has a driver");
            return;
        }
        // SAFETY: there is no driver, so nothing is launched.
        let error = unsafe { Cuda.launch(&KERNEL, launch, 0, &0usize) }.unwrap_err();
        let expected = if fatbin_bytes() == 0 {
            "install nvcc"
        } else {
            "install or update NVIDIA's driver"
        };
        assert!(error.to_string().contains(expected), "{error}");
    }
}
