// The rule of every C function: catch everything, keep the sentence for the calling thread, return the status.
#pragma once

#include <exception>
#include <new>
#include <utility>

#include "core/error.h"
#include "core/layer_config.h"
#include "moe_infer.h"

namespace moe_infer {

// Keeps `message` for moe_infer_last_error of the calling thread. Never throws.
void set_last_error(char const* message) noexcept;

// Runs `function`. Returns MOE_INFER_OK, or the status of what it threw, whose sentence moe_infer_last_error then
// gives.
template <class Function>
int guarded(Function&& function) noexcept {
  try {
    std::forward<Function>(function)();
    return MOE_INFER_OK;
  } catch (Error const& error) {
    set_last_error(error.what());
    return error.status();
  } catch (std::bad_alloc const&) {
    set_last_error("moe_infer: not enough host memory");
    return MOE_INFER_INTERNAL;
  } catch (std::exception const& error) {
    set_last_error(error.what());
    return MOE_INFER_INTERNAL;
  } catch (...) {
    set_last_error("moe_infer: unknown error");
    return MOE_INFER_INTERNAL;
  }
}

// A type as the C entry gives it; `input` goes into the error's text. Throws Error(MOE_INFER_INVALID).
DataType parse_dtype(char const* input, int32_t number);
// The inputs as the C entry gives them, with their types checked. Throws Error(MOE_INFER_INVALID).
LayerInputs parse_inputs(moe_infer_inputs const& inputs);

}  // namespace moe_infer
