/* Stands in for libnvinfer, libnvinfer_plugin and libnvonnxparser, so that TensorRT's Python bindings can be imported
   where TensorRT is not: every entry point that the bindings link to returns nothing. Good for reading names and
   signatures, and for what the bindings do in Python; no network, engine or parser can be made. */
#include <stdint.h>

void *createInferBuilder_INTERNAL(void *logger, int32_t version) { return 0; }
void *createInferRuntime_INTERNAL(void *logger, int32_t version) { return 0; }
void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t version) { return 0; }
void *createNvOnnxParser_INTERNAL(void *network, void *logger, int32_t version) { return 0; }
void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int32_t version) { return 0; }
void *getPluginRegistry(void) { return 0; }
void *getBuilderPluginRegistry(int32_t capability) { return 0; }
int32_t getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void *logger, const char *plugin_namespace) { return 0; }
