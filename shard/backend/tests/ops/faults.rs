//! What is said when the device fails.

use backend::{Backend, BackendError, DType};

use crate::cases::cuda;

#[test]
#[ignore = "leaves the process without a GPU: run it alone, with --ignored"]
fn a_fault_names_its_kernel_and_lasts() {
    let Some(mut backend) = cuda() else { return };
    let fault = backend.provoke_fault().unwrap_err();
    let text = fault.to_string();
    assert!(matches!(fault, BackendError::DeviceLost { .. }), "{text}");
    assert!(text.contains("last launched: fault"), "{text}");
    eprintln!("{text}");
    // Nothing works any more, and every call says so in the same way.
    let Err(later) = backend.buffer(1, 8, DType::F32) else { panic!("a buffer on a lost device") };
    assert!(matches!(later, BackendError::DeviceLost { .. }), "{later}");
    eprintln!("{later}");
    // Its memory cannot be given back.
    std::mem::forget(backend);
}
