/** The API's description, by Swagger UI. */

SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href, // It may lie below a prefix.
  dom_id: "#operations",
  deepLinking: true,
  validatorUrl: null, // No service elsewhere is asked whether the description is right.
});
